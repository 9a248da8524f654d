"""What can be wrong with an adapter that was found."""

from rlr_peft.errors import UserError


class AdapterFormatError(UserError, ValueError):
    """A file that is no adapter, is damaged, contradicts itself, or is of a kind that cannot be loaded."""


class AdapterMismatchError(UserError, RuntimeError):
    """The adapter is of another base, or what was loaded is not what its file says."""
