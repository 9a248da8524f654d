"""Places for what a command writes, looked at before it spends time."""

import os
from pathlib import Path

from rlr_peft.config import ConfigError
from rlr_peft.config.parsing import exit_with


def make_folder_or_exit(flag: str, folder: Path) -> None:
    """Makes the folder; where that or writing into it is impossible, one line on stderr and exit code 2."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        exit_with(
            ConfigError(f"{flag}: expected a place that can be written to, got {folder} ({reason}); choose another.")
        )
