"""The file storage: another origin than the Hub."""

import hashlib

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from tests.hub.answers import refused
from tests.hub.store import RefusedError, Store


class Storage:
    """Where LFS files go and come from: another origin than the Hub's, and without tokens."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/upload/{oid}", self.upload, methods=["PUT"]),
                Route("/download/{oid}", self.download, methods=["GET"]),
            ],
            exception_handlers={RefusedError: refused},
        )

    async def upload(self, request: Request) -> Response:
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != request.path_params["oid"]:
            raise RefusedError(400, "The content does not have the announced SHA-256 sum")
        (self.store.lfs / request.path_params["oid"]).write_bytes(content)
        return Response(status_code=200)

    async def download(self, request: Request) -> Response:
        return FileResponse(self.store.lfs / request.path_params["oid"])
