"""The one error of rewards."""

from rlr_peft.errors import UserError


class RewardError(UserError, ValueError):
    """A reward could not be loaded, failed, or returned something that is not one finite number per image.

    Args:
        message: what was expected, what was got, and what to do.
        raised: what a user's own code raised; its traceback tells where in that code, and holds no frame of ours.
    """

    def __init__(self, message: str, raised: BaseException | None = None) -> None:
        super().__init__(message)
        self.raised = raised
