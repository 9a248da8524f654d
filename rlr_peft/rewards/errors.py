"""The one error of rewards."""

from rlr_peft.errors import UserError


class RewardError(UserError, ValueError):
    """A reward could not be loaded, failed, or returned something that is not one finite number per image."""
