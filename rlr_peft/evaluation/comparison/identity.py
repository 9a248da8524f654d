"""What an image or a score depends on, as plain values: kept work is found again only where all of it is the same."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

KEY_LENGTH = 16  # hexadecimal digits


def digest(*parts: Any) -> str:
    """A short key of plain values: equal for equal values, in every process and on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def model_identity(name: str | None, revision: str | None = None, cache_dir: str | None = None) -> Any:
    """Of a loaded model: the commit of a Hub repository; of a folder its files' names, sizes and times of change.

    Weights of many gigabytes are not read for this. A copied folder counts as another one, which costs drawing again
    and never a wrong image.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.exists():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return [[file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    for file in ("model_index.json", "config.json"):
        found = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
        if isinstance(found, str):
            return [name, Path(found).parent.name]  # the snapshot's folder is named after the commit
    return [name, revision]


def file_identity(path: str | None) -> str | None:
    """SHA-256 of a small file."""
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def reward_identity(spec: str) -> Any:
    """Of a reward: its spec, and the source of a user's callable; a server is asked for its version besides."""
    source, _, _ = spec.rpartition(":")
    if not source or spec.startswith(("http://", "https://")):
        return [spec]
    if source.endswith(".py"):
        return [spec, file_identity(source)]
    try:
        found = importlib.util.find_spec(source)
    except (ImportError, ValueError):
        return [spec]
    origin = None if found is None else found.origin
    return [spec, file_identity(origin) if origin is not None and Path(origin).is_file() else None]
