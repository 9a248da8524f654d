"""What is published of an output folder: a list of what may go; secrets may not."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import get_token

from rlr_peft.publishing.hub_access import WEIGHT_NAME
from rlr_peft.publishing.hub_client import HubError
from rlr_peft.redaction import redacted

# Nothing else ever leaves the folder: no checkpoint, no optimiser state, no logs.
PUBLISHED = (
    WEIGHT_NAME,
    f"transformer_2/{WEIGHT_NAME}",
    "kohya/lora_kohya.safetensors",
    "README.md",
    "before_after.png",
    "reward_curve.png",
    "images/*.png",
    "images/*.gif",
    "images/*.mp4",
    "config.yaml",
    "metrics.json",
    "metrics.jsonl",
    "scores.parquet",
    "compare.html",
)
# What a run itself makes: on the Hub these files are an earlier run's where this one lacks them, all others the user's.
MADE = (
    *(name for name in PUBLISHED if "*" not in name),
    *(f"images/{kind}_*.{suffix}" for kind in ("validation", "base", "adapter") for suffix in ("png", "gif", "mp4")),
)
TEXT_SUFFIXES = (".md", ".yaml", ".json", ".jsonl", ".html")


def published_files(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file, of everything in the folder that is published.

    Raises:
        HubError: the folder holds no adapter, or a link that leads out of it.
    """
    files = {
        path.relative_to(folder).as_posix(): path
        for pattern in PUBLISHED
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    if WEIGHT_NAME not in files:
        raise HubError(
            f"Expected an output folder of train_rlr_lora.py with {WEIGHT_NAME}, got {folder}; check the path."
        )
    for path in files.values():  # a folder from elsewhere would publish any file of this machine
        if not path.resolve().is_relative_to(folder.resolve()):
            raise HubError(f"{path} is a link to {path.resolve()}, outside of the folder; put the file itself there.")
    return files


def is_ours(name: str) -> bool:
    """Whether a file on the Hub is one that a run made."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in MADE)


def tokens_in_use(token: str | None) -> list[str]:
    """The tokens that are in use; of any length, so that one of an unusual form does not slip through."""
    return [secret for secret in dict.fromkeys((token, get_token())) if secret]


def content_for_upload(path: Path, token: str | None) -> bytes | Path:
    """The file, or of a text file that holds secrets its text with them crossed out.

    Raises:
        HubError: another file holds the access token.
    """
    content, secrets = path.read_bytes(), tokens_in_use(token)
    if path.suffix in TEXT_SUFFIXES:
        text = content.decode(errors="surrogateescape")
        hidden = redacted(text, secrets)
        return path if hidden == text else hidden.encode(errors="surrogateescape")
    if any(secret.encode() in content for secret in secrets):
        raise HubError(f"{path} holds the access token and is not published: remove the token from it.")
    return path
