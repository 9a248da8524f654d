"""Repositories on disk: commits, branches and tags as JSON, contents by their hash. Nothing is ever overwritten."""

import base64
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".gif", ".bin")


class RefusedError(Exception):
    """An HTTP answer that is an error: status, `X-Error-Code` if the client knows one, and a message."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Entry:
    """A file of a commit. `lfs` is its sha256 when it lies in the LFS storage; `oid` is git's blob id."""

    oid: str
    size: int
    lfs: str | None


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """One repository in a folder of its own."""

    def __init__(self, folder: Path, lfs: Path) -> None:
        self.folder, self.lfs = folder, lfs

    @property
    def info(self) -> dict[str, Any]:
        return json.loads((self.folder / "repository.json").read_text())

    def _save(self, info: dict[str, Any]) -> None:
        (self.folder / "repository.json").write_text(json.dumps(info, indent=1))

    @classmethod
    def create(cls, folder: Path, lfs: Path, *, id_: str, kind: str, private: bool) -> "Repository":
        (folder / "blobs").mkdir(parents=True)
        (folder / "commits").mkdir()
        repository = cls(folder, lfs)
        repository._save({"id": id_, "kind": kind, "private": private, "branches": {}, "tags": {}})
        repository._write_commit("main", {".gitattributes": repository._add_blob(b"")}, "initial commit", "", None)
        return repository

    def resolve(self, revision: str) -> str:
        """The commit of a branch, a tag or a commit id."""
        info = self.info
        for refs in (info["branches"], info["tags"]):
            if revision in refs:
                return refs[revision]
        if (self.folder / "commits" / f"{revision}.json").exists():
            return revision
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit_record(self, oid: str) -> dict[str, Any]:
        return json.loads((self.folder / "commits" / f"{oid}.json").read_text())

    def history(self, revision: str) -> list[dict[str, Any]]:
        """Commits, newest first."""
        commits, oid = [], self.resolve(revision)
        while oid:
            commits.append({"oid": oid, **self.commit_record(oid)})
            oid = commits[-1]["parent"]
        return commits

    def files(self, revision: str) -> dict[str, Entry]:
        files = self.commit_record(self.resolve(revision))["files"]
        return {path: Entry(**entry) for path, entry in sorted(files.items())}

    def content(self, entry: Entry) -> Path:
        return self.lfs / entry.lfs if entry.lfs else self.folder / "blobs" / entry.oid

    def read(self, path: str, revision: str = "main") -> bytes:
        return self.content(self.files(revision)[path]).read_bytes()

    def commit(self, branch: str, lines: list[dict[str, Any]]) -> str:
        """Applies the ndjson lines of a commit to a branch; returns the new commit."""
        head = self.info["branches"].get(branch)
        if head is None:
            raise RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, head):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self.files(branch))
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = self._add_blob(base64.b64decode(value["content"]))
                case "lfsFile":
                    if not (self.lfs / value["oid"]).exists():
                        raise RefusedError(400, f"LFS object {value['oid']} was never uploaded")
                    files[value["path"]] = self._lfs_entry(value["oid"])
                case "deletedFile":
                    del files[value["path"]]
                case "deletedFolder":
                    files = {path: entry for path, entry in files.items() if not path.startswith(value["path"])}
        return self._write_commit(branch, files, header["summary"], header.get("description", ""), head)

    def branch(self, name: str, start: str) -> None:
        info = self.info
        if name in info["branches"]:
            raise RefusedError(409, f"Reference already exists: {name}")
        info["branches"][name] = self.resolve(start)
        self._save(info)

    def tag(self, name: str, revision: str) -> None:
        info = self.info
        if name in info["tags"]:
            raise RefusedError(409, f"Tag already exists: {name}")
        info["tags"][name] = self.resolve(revision)
        self._save(info)

    def _add_blob(self, content: bytes) -> Entry:
        oid = git_blob_id(content)
        (self.folder / "blobs" / oid).write_bytes(content)
        return Entry(oid, len(content), None)

    def _lfs_entry(self, sha256: str) -> Entry:
        size = (self.lfs / sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return Entry(git_blob_id(pointer.encode()), size, sha256)

    def _write_commit(
        self, branch: str, files: dict[str, Entry], summary: str, description: str, parent: str | None
    ) -> str:
        record = {
            "parent": parent,
            "summary": summary,
            "description": description,
            "files": {path: vars(entry) for path, entry in files.items()},
            "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
        }
        oid = hashlib.sha1(json.dumps([record, time.time_ns()]).encode()).hexdigest()
        (self.folder / "commits" / f"{oid}.json").write_text(json.dumps(record, indent=1))
        info = self.info
        info["branches"][branch] = oid
        self._save(info)
        return oid


class Store:
    """All repositories and LFS objects of a Hub.

    Args:
        root: the folder that holds everything.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lfs = root / "lfs"
        self.lfs.mkdir(parents=True, exist_ok=True)

    def find(self, kind: str, id_: str) -> Repository | None:
        folder = self._folder(kind, id_)
        return Repository(folder, self.lfs) if folder.exists() else None

    def create(self, kind: str, id_: str, *, private: bool) -> Repository:
        return Repository.create(self._folder(kind, id_), self.lfs, id_=id_, kind=kind, private=private)

    def _folder(self, kind: str, id_: str) -> Path:
        # Like the Hub's, names differ in more than upper and lower case.
        return self.root / kind / id_.lower()
