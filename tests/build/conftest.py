"""The folder that whole runs work from."""

from tests.training.conftest import workplace

__all__ = ["workplace"]
