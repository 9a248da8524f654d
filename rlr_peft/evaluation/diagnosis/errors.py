"""The one error of a diagnosis that its user can do something about."""

from rlr_peft.errors import UserError


class DiagnosisError(UserError, ValueError):
    """The samples cannot tell anything about the estimators."""
