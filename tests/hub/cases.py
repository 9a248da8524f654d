"""The faults that the tests order, with what comes of each; `docs/hub.md` shows them as a table.

`python -m tests.hub.cases` writes that table.
"""

import re
from pathlib import Path
from typing import Any

from tests.hub.folders import WEIGHTS
from tests.hub.processes import FINE_GRAINED, OTHER, READER
from tests.programs import ROOT

DOCUMENT = ROOT / "docs" / "hub.md"
START, END = "<!-- faults -->\n", "<!-- end of faults -->\n"

# What is known before training -> how it is brought about, and a part of the message.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no token": ({"token": None}, "owner/refused", "there is none"),
    "bad token": ({"token": "hf_thisTokenWasNeverGivenToAnyone00000"}, "owner/refused", "refused the access token"),
    "token that may only read": ({"token": READER}, "owner/refused", "may only read"),
    "fine-grained token without the right to write": ({"token": FINE_GRAINED}, "owner/public", "may not write to"),
    "repository of another user": ({"token": OTHER}, "owner/public", "cannot write to owner/public"),
    "organisation in which one may only read": ({}, "club/refused", "may only read in the organisation club"),
    "name taken by another model": ({}, "owner/foreign", "taken by another model (it holds model.safetensors)"),
    "not a name": ({}, "owner/a b", "choose another --hub_model_id"),
    "public repository where a private one is asked for": ({"private": True}, "owner/public", "is public"),
    "Hub that cannot be reached": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "owner/refused", "cannot be reached"),
    "offline mode": ({"HF_HUB_OFFLINE": "1"}, "owner/refused", "offline mode is on"),
}


def _status(request: str, code: int, times: int | None, **more: object) -> dict[str, Any]:
    return {"request": request, "kind": "status", "status": code, "times": times, **more}


WHOAMI, CREATE, YAML = "GET /api/whoami", "POST /api/repos/create", "POST /api/validate-yaml"
INFO, PREUPLOAD, COMMIT = "GET /api/models/owner/", "POST .*/preupload/", "POST .*/commit/"
BATCH, PUT, GET = "POST .*/objects/batch", "PUT /upload", "GET /download"
CUT = {"request": PUT, "kind": "cut", "after": 60_000}

PASSING: dict[str, dict[str, Any]] = {
    "whoami answers 429 once": _status(WHOAMI, 429, 1),
    "whoami is reset once": {"request": WHOAMI, "kind": "refuse", "times": 1},
    "creating the repository answers 500 twice": _status(CREATE, 500, 2),
    "model info answers 503 once": _status(INFO, 503, 1),
    "the check of the card answers 500 twice": _status(YAML, 500, 2),
    "the announcement of the files answers 500 twice": _status(PREUPLOAD, 500, 2),
    "the LFS batch answers 500 twice": _status(BATCH, 500, 2),
    "the upload answers 500 twice": _status(PUT, 500, 2),
    "the connection is cut in the middle of an LFS upload": {
        "request": PUT,
        "kind": "cut",
        "after": 60_000,
        "times": 1,
    },
    "the commit answers 502 once": _status(COMMIT, 502, 1),
    "the commit answers 429 with Retry-After": _status(COMMIT, 429, 1, headers={"Retry-After": "2"}),
    "the commit answers 429 with the Hub's RateLimit": _status(COMMIT, 429, 1, headers={"RateLimit": '"api";r=0;t=1'}),
    "the commit is made, its answer is lost": {"request": COMMIT, "kind": "lost", "times": 1},
    "the download that checks is reset once": {"request": GET, "kind": "refuse", "times": 1},
}
# The Hub is well when access is checked, and fails for good afterwards.
LASTING: dict[str, tuple[dict[str, Any], str]] = {
    "the commit always answers 503": (_status(COMMIT, 503, None), "trouble of its own (HTTP 503"),
    "the commit always answers 429": (_status(COMMIT, 429, None), "was asked too often (HTTP 429"),
    "the commit answers 429, Retry-After an hour": (
        _status(COMMIT, 429, None, headers={"Retry-After": "3600"}),
        "was asked too often (HTTP 429",
    ),
    "the right to write is taken away": (_status(COMMIT, 403, None), "may not do this (HTTP 403"),
    "every LFS upload is cut": (CUT, f"Error while uploading '{WEIGHTS}'"),
    "the Hub's disk is full": (_status(PUT, 507, None), "has no space left (HTTP 507"),
    "the Hub cannot be reached any more": (
        {"request": f"{YAML}|{COMMIT}|{BATCH}", "kind": "refuse"},
        "cannot be reached",
    ),
    "the card's metadata are refused": (_status(YAML, 400, None), "Invalid metadata in README.md"),
}
# The Hub accepts the commit, and has not what was sent.
NOT_FOUND = {"X-Error-Code": "EntryNotFound"}
INCOMPLETE: dict[str, tuple[dict[str, Any], str]] = {
    "the commit is accepted, a file is not there": (
        _status(f"HEAD .*/resolve/.*/{WEIGHTS}", 404, None, headers=NOT_FOUND),
        f"was accepted, but {WEIGHTS} cannot be downloaded from it",
    ),
    "the commit is accepted, the storage has lost a file": (
        _status(GET, 404, None),
        f"was accepted, but {WEIGHTS} cannot be downloaded from it",
    ),
    "the commit is accepted, a file comes back changed": (
        {"request": GET, "kind": "other"},
        f"was accepted, but {WEIGHTS} came back with other bytes than were sent",
    ),
}
LOCAL = {
    "no disk space for the copy that is compared": (
        "exit code 1, `Commit ... was accepted, but ... could not be downloaded to check it`, and the command for that"
    ),
    "checkpoints cannot be published while training": (
        "training goes on; the end of the run names every one of them with the command that publishes it"
    ),
    "an image holds the access token": "exit code 1, `... holds the access token and is not published`",
    "a Hub without Xet storage": "a warning, and the upload over plain HTTP",
}


def name_of(case: str) -> str:
    """A repository for the case."""
    return "owner/" + re.sub(r"\W+", "-", case).lower()


def table() -> str:
    """Every fault and what comes of it, as Markdown."""
    rows = [
        (f"{case}", f"before training: exit code 1, `... {message} ...`") for case, (*_, message) in REFUSED.items()
    ]
    rows += [(case, "waited out: one commit, exit code 0") for case in PASSING]
    rows += [
        (case, f"exit code 1, `... {message} ...` and the command for later, which then works")
        for case, (_, message) in LASTING.items()
    ]
    rows += [
        (case, f"exit code 1, `... {message} ...`, and how to take the file out of the Hub and send it anew")
        for case, (_, message) in INCOMPLETE.items()
    ]
    rows += list(LOCAL.items())
    return "\n".join(["| what goes wrong | what happens |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""])


def with_table(document: str) -> str:
    """The document with its table of today."""
    head, rest = document.split(START)
    return f"{head}{START}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"Wrote {Path(DOCUMENT)}")
