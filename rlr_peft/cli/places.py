"""Places for what a command writes, looked at before it spends time."""

import os
from pathlib import Path

from rlr_peft.config import ConfigError
from rlr_peft.config.parsing import exit_with


def check_folder_or_exit(flag: str, folder: Path) -> None:
    """Where the folder can be neither written to nor made, one line on stderr and exit code 2; nothing is made yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return
    reason = "cannot be written to" if existing.is_dir() else "is a file"
    exit_with(
        ConfigError(
            f"{flag}: expected a place that can be written to, got {folder}, where {existing} {reason}; choose another."
        )
    )
