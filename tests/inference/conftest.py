"""The pipelines of the families' tests."""

from tests.families.conftest import folder_of, quiet

__all__ = ["folder_of", "quiet"]
