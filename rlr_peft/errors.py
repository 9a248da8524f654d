"""Errors that explain themselves to the user: what was expected, what was got, and what to do."""


class UserError(Exception):
    """Its message is all that a user needs; the programs print it without a traceback."""
