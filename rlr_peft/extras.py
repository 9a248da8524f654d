"""Packages that a plain install leaves out, because few runs need them."""

import importlib
from types import ModuleType

from rlr_peft.errors import UserError


def extra(module: str, name: str, wanted_by: str) -> ModuleType:
    """Imports an optional package.

    Args:
        module: what is imported.
        name: the extra of `pip install 'rlr-peft[NAME]'` that brings it.
        wanted_by: the option that cannot do without, as a user writes it.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{wanted_by}: expected the package {module}, which cannot be imported here ({error}). "
            f"Run `pip install 'rlr-peft[{name}]'`, or leave {wanted_by} out."
        ) from error
