"""Errors that explain themselves to the user: what was expected, what was got, and what to do."""

from rlr_peft.redaction import redacted


class UserError(Exception):
    """Its message is all that a user needs; the programs print it without a traceback.

    What it quotes may hold a secret, such as the address of a reward server: that is crossed out when it is made, so
    that whoever shows or keeps it need not think of it.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted(message))
