"""Parts of answers that several endpoints give."""

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub.store import Entry, RefusedError, Repository


def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
    return JSONResponse({"error": error.message}, error.status, headers)


def described(entry: Entry) -> dict[str, object]:
    description: dict[str, object] = {"size": entry.size, "oid": entry.oid, "blobId": entry.oid}
    if entry.lfs is not None:
        description["lfs"] = {"oid": entry.lfs, "sha256": entry.lfs, "size": entry.size, "pointerSize": 134}
    return description


def card_data(repository: Repository, revision: str) -> dict[str, object]:
    if "README.md" not in repository.files(revision):
        return {}
    parts = repository.read("README.md", revision).decode().split("---\n")
    return yaml.safe_load(parts[1]) if len(parts) > 2 else {}
