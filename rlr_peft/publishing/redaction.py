"""Secrets stay out of what is shown and published."""

from __future__ import annotations

import re
from collections.abc import Sequence

from huggingface_hub import get_token

HIDDEN = "***"
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_USER_IN_URL = re.compile(r"(?<=://)[^\s/@\"'<>]+(?=@)")  # with or without a password: tokens stand alone there
_KEY_IN_QUERY = re.compile(
    r"(?<=[?&])([\w-]*(?:token|key|secret|passw(?:or)?d|signature|sig|auth)[\w-]*=)[^\s&#\"'<>]+", re.IGNORECASE
)


def redacted(text: str, secrets: Sequence[str] = ()) -> str:
    """The text without these secrets, what looks like an access token, and users, passwords and keys in URLs."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _KEY_IN_QUERY.sub(rf"\1{HIDDEN}", _USER_IN_URL.sub(HIDDEN, _TOKEN.sub(HIDDEN, text)))


def command_without_token(words: Sequence[str]) -> list[str]:
    """A command line without `--hub_token TOKEN` and `--hub_token=TOKEN`."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or word.startswith("--hub_token="):
            skip = False
            continue
        if word == "--hub_token":
            skip = True
            continue
        kept.append(word)
    return kept


def tokens_in_use(token: str | None) -> list[str]:
    """The tokens that are in use; of any length, so that a mistake of the pattern above cannot let them through."""
    return [secret for secret in dict.fromkeys((token, get_token())) if secret]
