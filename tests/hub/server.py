"""A Hub on loopback, for the real `huggingface_hub` client: `python -m tests.hub.server FOLDER` prints its address.

It speaks what the client of version 2.4 asks for: repositories with commits, branches and tags, LFS on a second port
(as the Hub's storage is another origin), private repositories, organisations, tokens with roles, models and datasets.
"""

import asyncio
import json
import socket
import sys
from pathlib import Path

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from tests.hub.answers import card_data, described, refused
from tests.hub.faults import FaultInjection, FaultState
from tests.hub.storage import Storage
from tests.hub.store import LFS_SUFFIXES, RefusedError, Repository, Store
from tests.hub.users import USERS, User


class Hub:
    """The endpoints.

    Args:
        store: where everything is kept.
        endpoint: address of this server.
        storage: address of the file storage.
    """

    def __init__(self, store: Store, endpoint: str, storage: str) -> None:
        self.store, self.endpoint, self.storage = store, endpoint, storage

    def application(self) -> Starlette:
        routes = [
            Route("/api/agent-harnesses", self.agent_harnesses),
            Route("/api/whoami-v2", self.whoami),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route("/lfs/verify", self.verify, methods=["POST"]),
        ]
        for prefix, kind in (("", "models"), ("/datasets", "datasets")):
            api = f"/api/{kind}/{{owner}}/{{name}}"
            for path, endpoint, method in (
                (f"{prefix}/{{owner}}/{{name}}.git/info/lfs/objects/batch", self.lfs_batch, "POST"),
                (f"{prefix}/{{owner}}/{{name}}/resolve/{{revision}}/{{path:path}}", self.resolve, "GET"),
                (f"{api}/revision/{{revision}}", self.repository_info, "GET"),
                (f"{api}/tree/{{revision}}", self.tree, "GET"),
                (f"{api}/tree/{{revision}}/{{path:path}}", self.tree, "GET"),
                (f"{api}/paths-info/{{revision}}", self.paths_info, "POST"),
                (f"{api}/preupload/{{revision}}", self.preupload, "POST"),
                (f"{api}/commit/{{revision}}", self.commit, "POST"),
                (f"{api}/commits/{{revision}}", self.commits, "GET"),
                (f"{api}/branch/{{revision}}", self.branch, "POST"),
                (f"{api}/tag/{{revision}}", self.tag, "POST"),
                (f"{api}/refs", self.refs, "GET"),
                (api, self.repository_info, "GET"),
            ):
                routes.append(Route(path, _of(kind, endpoint), methods=[method]))
        return Starlette(routes=routes, exception_handlers={RefusedError: refused})

    # Who asks

    def user(self, request: Request) -> User | None:
        header = request.headers.get("authorization")
        if header is None:
            return None
        user = USERS.get(header.removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return user

    def repository(self, request: Request, kind: str, *, write: bool = False) -> Repository:
        """The repository of the request's path, if the one who asks may see it (and write to it)."""
        user, owner = self.user(request), request.path_params["owner"]
        repository = self.store.find(kind, f"{owner}/{request.path_params['name']}")
        belongs = user is not None and (owner == user.name or owner in user.organisations)
        if repository is None or (repository.info["private"] and not belongs):
            raise RefusedError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and not (belongs and self.may_write(user, owner)):
            raise RefusedError(403, "Forbidden: you don't have the required permissions to perform this action")
        return repository

    @staticmethod
    def may_write(user: User | None, owner: str) -> bool:
        return user is not None and user.role == "write" and user.organisations.get(owner, "write") == "write"

    # Endpoints

    async def agent_harnesses(self, request: Request) -> Response:
        return JSONResponse({})

    async def whoami(self, request: Request) -> Response:
        user = self.user(request)
        if user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        organisations = [{"name": name, "roleInOrg": role} for name, role in user.organisations.items()]
        token = {"displayName": "a test", "role": user.role}
        answer = {"type": "user", "name": user.name, "fullname": user.name, "orgs": organisations}
        return JSONResponse({**answer, "auth": {"type": "access_token", "accessToken": token}})

    async def create(self, request: Request) -> Response:
        user, asked = self.user(request), await request.json()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        owner, kind = asked.get("organization") or user.name, asked.get("type", "model") + "s"
        if (owner != user.name and owner not in user.organisations) or not self.may_write(user, owner):
            raise RefusedError(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        id_ = f"{owner}/{asked['name']}"
        url = f"{self.endpoint}/{'' if kind == 'models' else kind + '/'}{id_}"
        if self.store.find(kind, id_) is not None:
            return JSONResponse({"error": "You already created this repo", "url": url}, 409)
        self.store.create(kind, id_, private=asked.get("visibility") == "private")
        return JSONResponse({"url": url, "name": id_})

    async def validate_yaml(self, request: Request) -> Response:
        content = (await request.json())["content"]
        parts = content.split("---\n")
        try:
            metadata = yaml.safe_load(parts[1]) if content.startswith("---\n") else {}
            errors = [] if isinstance(metadata, dict) else ["expected a mapping"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        else:
            if not errors and "base_model" in metadata and not isinstance(metadata["base_model"], (str, list)):
                errors = ['"base_model" must be a string']
        status = 400 if errors else 200
        return JSONResponse({"errors": [{"message": error} for error in errors], "warnings": []}, status)

    async def repository_info(self, request: Request, kind: str) -> Response:
        repository = self.repository(request, kind)
        revision = request.path_params.get("revision", "main")
        info, files = repository.info, repository.files(revision)
        card = card_data(repository, revision)
        return JSONResponse(
            {
                "id": info["id"],
                "modelId": info["id"],
                "sha": repository.resolve(revision),
                "private": info["private"],
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags", []),
                "cardData": card,
                "lastModified": repository.history(revision)[0]["date"],
                "siblings": [{"rfilename": path, **described(entry)} for path, entry in files.items()],
            }
        )

    async def tree(self, request: Request, kind: str) -> Response:
        files = self.repository(request, kind).files(request.path_params["revision"])
        folder = request.path_params.get("path", "").strip("/")
        inside = {path: e for path, e in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        start, folders, answer = len(folder) + 1 if folder else 0, set(), []
        recursive = request.query_params.get("recursive", "").lower() == "true"
        for path, entry in inside.items():
            parents = path[start:].split("/")[:-1]
            folders |= {path[:start] + "/".join(parents[: i + 1]) for i in range(len(parents) if recursive else 1)}
            if recursive or not parents:
                answer.append({"type": "file", "path": path, **described(entry)})
        folders -= {path[:start] for path in inside}
        answer += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders) if path]
        return JSONResponse([entry for entry in answer if entry["path"] not in files or entry["type"] == "file"])

    async def paths_info(self, request: Request, kind: str) -> Response:
        files = self.repository(request, kind).files(request.path_params["revision"])
        asked = (
            (await request.json())
            if "json" in request.headers.get("content-type", "")
            else {"paths": (await request.form()).getlist("paths")}
        )["paths"]
        answer = []
        for path in asked:
            if path in files:
                answer.append({"type": "file", "path": path, **described(files[path])})
            elif any(name.startswith(f"{path}/") for name in files):
                answer.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return JSONResponse(answer)

    async def preupload(self, request: Request, kind: str) -> Response:
        repository = self.repository(request, kind, write=True)
        files = repository.files(request.path_params["revision"])
        answer = []
        for asked in (await request.json())["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in files:
                answer[-1]["oid"] = files[path].lfs or files[path].oid
        return JSONResponse({"files": answer})

    async def lfs_batch(self, request: Request, kind: str) -> Response:
        self.repository(request, kind, write=True)
        objects = []
        for asked in (await request.json())["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.store.lfs / asked["oid"]).exists():
                upload = {"href": f"{self.storage}/upload/{asked['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.endpoint}/lfs/verify"}}
            objects.append(entry)
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def verify(self, request: Request) -> Response:
        asked = await request.json()
        path = self.store.lfs / asked["oid"]
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise RefusedError(404, "Object was never uploaded")
        return JSONResponse({})

    async def commit(self, request: Request, kind: str) -> Response:
        repository = self.repository(request, kind, write=True)
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        oid = repository.commit(request.path_params["revision"], lines)
        url = f"{self.endpoint}/{repository.info['id']}/commit/{oid}"
        return JSONResponse({"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    async def commits(self, request: Request, kind: str) -> Response:
        history = self.repository(request, kind).history(request.path_params["revision"])
        return JSONResponse(
            [
                {
                    "id": commit["oid"],
                    "title": commit["summary"],
                    "message": commit["description"],
                    "date": commit["date"],
                    "authors": [],
                }
                for commit in history
            ]
        )

    async def branch(self, request: Request, kind: str) -> Response:
        repository = self.repository(request, kind, write=True)
        asked = json.loads(await request.body() or b"{}")
        repository.branch(request.path_params["revision"], asked.get("startingPoint", "main"))
        return JSONResponse({})

    async def tag(self, request: Request, kind: str) -> Response:
        repository = self.repository(request, kind, write=True)
        repository.tag((await request.json())["tag"], request.path_params["revision"])
        return JSONResponse({})

    async def refs(self, request: Request, kind: str) -> Response:
        info = self.repository(request, kind).info

        def listed(refs: dict[str, str], where: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": oid} for n, oid in refs.items()]

        return JSONResponse(
            {"branches": listed(info["branches"], "heads"), "tags": listed(info["tags"], "tags"), "converts": []}
        )

    async def resolve(self, request: Request, kind: str) -> Response:
        repository = self.repository(request, kind)
        revision, path = request.path_params["revision"], request.path_params["path"]
        oid = repository.resolve(revision)
        entry = repository.files(oid).get(path)
        if entry is None:
            raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if entry.lfs is not None:
            location = f"{self.storage}/download/{entry.lfs}"
            linked = {"X-Linked-Etag": f'"{entry.lfs}"', "X-Linked-Size": str(entry.size), "Location": location}
            return Response(status_code=302, headers={**headers, **linked})
        return FileResponse(repository.content(entry), headers={**headers, "ETag": f'"{entry.oid}"'})


def _of(kind: str, endpoint):  # type: ignore[no-untyped-def]
    async def answer(request: Request) -> Response:
        return await endpoint(request, kind)

    return answer


async def serve(root: Path) -> None:
    """Both servers, until the process is ended."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    endpoint, storage = (f"http://127.0.0.1:{one.getsockname()[1]}" for one in sockets)
    store, state = Store(root), FaultState()
    applications = [Hub(store, endpoint, storage).application(), Storage(store).application()]
    servers = [
        uvicorn.Server(uvicorn.Config(FaultInjection(app, state), log_level="warning", lifespan="off"))
        for app in applications
    ]
    print(endpoint, flush=True)
    await asyncio.gather(*(server.serve([one]) for server, one in zip(servers, sockets, strict=True)))


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
