"""The loopback Hub keeps its promises to the real client: without that, the tests that use it say nothing."""

import json

import pytest

from tests.hub.processes import OTHER, OWNER, READER, LoopbackHub, run
from tests.programs import EVERYTHING, LIBRARIES

CLIENT = """
import json, os, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import *
api = HfApi()
def report(**facts): print(json.dumps(facts))
def caught(call, *args, **kwargs):
    try:
        return call(*args, **kwargs) and ""
    except Exception as error:
        return type(error).__name__
"""


def client(hub: LoopbackHub, code: str, token: str | None = OWNER, **environment: str) -> dict:
    imported = LIBRARIES if environment else EVERYTHING
    done = run(["-c", CLIENT + code], hub.environment(token, **environment), imported=imported)
    return json.loads(done.stdout)


def test_commits_branches_tags_and_files(hub: LoopbackHub) -> None:
    facts = client(
        hub,
        """
repo = "owner/everything"
api.create_repo(repo)
first = api.create_commit(repo, [CommitOperationAdd("a/weights.safetensors", b"w" * 3000),
    CommitOperationAdd("README.md", b"---\\ntags: [x]\\n---\\nhello"), CommitOperationAdd("old.txt", b"old")],
    commit_message="first").oid
again = api.create_commit(repo, [CommitOperationAdd("a/weights.safetensors", b"w" * 3000)], commit_message="again").oid
second = api.create_commit(repo, [CommitOperationDelete("old.txt")], commit_message="second", parent_commit=first).oid
stale = caught(api.create_commit, repo, [CommitOperationAdd("b", b"b")], commit_message="c", parent_commit=first)
api.create_branch(repo, branch="side", revision=first)
api.create_tag(repo, tag="v1", revision=first)
info = api.model_info(repo, files_metadata=True)
folder = snapshot_download(repo, revision="v1")
weights = open(hf_hub_download(repo, "a/weights.safetensors", revision="side"), "rb").read()
report(again=again == first, stale=stale, sha=info.sha == second, tags=info.tags,
    files=sorted(s.rfilename for s in info.siblings), size=[s.size for s in info.siblings if s.lfs],
    refs=sorted(b.name for b in api.list_repo_refs(repo).branches), old=open(folder + "/old.txt").read(),
    weights=len(weights), titles=[c.title for c in api.list_repo_commits(repo)],
    tree=[e.path for e in api.list_repo_tree(repo, recursive=True)],
    missing=caught(hf_hub_download, repo, "nothing"), unknown=caught(api.model_info, repo, revision="nowhere"))
""",
    )
    assert facts == {
        "again": True,
        "stale": "HfHubHTTPError",
        "sha": True,
        "tags": ["x"],
        "files": [".gitattributes", "README.md", "a/weights.safetensors"],
        "size": [3000],
        "refs": ["main", "side"],
        "old": "old",
        "weights": 3000,
        "titles": ["second", "first", "initial commit"],
        "tree": [".gitattributes", "README.md", "a/weights.safetensors", "a"],
        "missing": "RemoteEntryNotFoundError",
        "unknown": "RevisionNotFoundError",
    }


def test_who_may_see_and_write_what(hub: LoopbackHub) -> None:
    code = """
report(private=caught(api.model_info, "owner/hidden"), public=caught(api.model_info, "owner/shown"),
    create=caught(api.create_repo, "owner/new-one"), again=caught(api.create_repo, "owner/shown"),
    write=caught(api.create_commit, "owner/shown", [CommitOperationAdd("x", b"x")], commit_message="x"))
"""
    client(hub, 'api.create_repo("owner/hidden", private=True)\napi.create_repo("owner/shown")\nreport()')
    hidden = "RepositoryNotFoundError"
    assert client(hub, code, OTHER) == {
        "private": hidden,
        "public": "",
        "create": "HfHubHTTPError",
        "again": "HfHubHTTPError",
        "write": "HfHubHTTPError",
    }
    assert client(hub, code, READER)["private"] == "" and client(hub, code, None)["private"] == hidden
    assert client(hub, code)["write"] == ""


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"kind": "status", "status": 500}, "HfHubHTTPError"),
        ({"kind": "refuse"}, "Error"),
        ({"kind": "lost"}, "Error"),
    ],
)
def test_faults_happen_as_ordered(hub: LoopbackHub, fault: dict, expected: str) -> None:
    hub.fail({"request": "POST /api/repos/create", "times": 1, **fault})
    name = f"owner/ordered-{fault['kind']}"
    facts = client(hub, f'report(first=caught(api.create_repo, "{name}"), second=caught(api.create_repo, "{name}"))')
    assert facts["first"].endswith(expected)
    # What was lost was done all the same.
    assert bool(facts["second"]) == (fault["kind"] == "lost")
    assert len(hub.requests("POST /api/repos/create")) == 2


def test_an_upload_that_is_cut_is_tried_again_by_the_client(hub: LoopbackHub) -> None:
    hub.fail({"request": "PUT /upload", "kind": "cut", "after": 100_000, "times": 1})
    client(
        hub,
        """
api.create_repo("owner/cut")
content = os.urandom(3_000_000)
api.create_commit("owner/cut", [CommitOperationAdd("w.safetensors", content)], commit_message="m")
report(same=open(hf_hub_download("owner/cut", "w.safetensors"), "rb").read() == content)
""",
    )
    assert len(hub.requests("PUT /upload")) == 2


def test_no_other_machine_can_be_reached(hub: LoopbackHub) -> None:
    facts = client(hub, "report(got=caught(api.whoami))", HF_ENDPOINT="http://192.0.2.1")
    assert facts["got"] == "ProxyError" or facts["got"] == "ConnectError"
