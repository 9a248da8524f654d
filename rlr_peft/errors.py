"""Errors that explain themselves to the user: what was expected, what was got, and what to do."""

from rlr_peft.foreign_text import printable
from rlr_peft.redaction import redacted

LONGEST_LINE = 1200  # characters; of a longer one the beginning and the end are shown, which hold place and advice
_BEGINNING, _END = 800, 300


class UserError(Exception):
    """Its message is all that a user needs; the programs print it without a traceback.

    What it quotes may hold a secret, such as the address of a reward server: that is crossed out when it is made, so
    that whoever shows or keeps it need not think of it.

    Each argument is a line of the message. What it repeats of files and servers neither breaks a line nor makes it
    endless: line breaks and control characters are written out, and a very long line is cut in the middle.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*(redacted(line) for line in lines))

    def __str__(self) -> str:
        return "\n".join(_line(str(argument)) for argument in self.args)


def _line(text: str) -> str:
    if len(text) > LONGEST_LINE:
        text = f"{text[:_BEGINNING]} [...] {text[-_END:]}"
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class RewardError(UserError, ValueError):
    """A reward could not be loaded, failed, or returned something that is not one finite number per image.

    Args:
        message: what was expected, what was got, and what to do.
        raised: what a user's own code raised; its traceback tells where in that code, and holds no frame of ours.
    """

    def __init__(self, message: str, raised: BaseException | None = None) -> None:
        super().__init__(message)
        self.raised = raised
