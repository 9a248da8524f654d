"""Faults to order: what goes wrong, at which endpoint, how often."""

import asyncio
import json
import re
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class FaultInjection:
    """ASGI middleware, the outermost, that breaks chosen requests and keeps a list of all.

    `POST /_faults` sets the list of faults, `{"request": REGEX of "METHOD PATH", "kind": KIND, "times": N or null}`:

    - `status`: answers `status` (and `headers`, `message`) instead of the application;
    - `refuse`: closes the connection at once;
    - `cut`: closes it after `after` bytes of the request's body;
    - `lost`: lets the application do its work and closes the connection instead of answering;
    - `slow`: waits `seconds` first;
    - `other`: answers with the first byte of every part of the body changed.

    `GET /_requests` lists every request since `DELETE /_requests`.
    """

    def __init__(self, application: ASGIApp, state: "FaultState") -> None:
        self.application, self.state = application, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        path = scope["path"]
        if path.startswith("/_"):
            await self._control(scope, receive, send)
            return
        request = f"{scope['method']} {path}"
        self.state.requests.append(request)
        fault = self.state.take(request)
        match fault and fault["kind"]:
            case None:
                await self.application(scope, receive, send)
            case "status":
                await _answer(send, fault["status"], fault.get("headers", {}), {"error": fault.get("message", "fault")})
            case "refuse":
                _close(receive)
            case "cut":
                received = 0
                while received < fault["after"]:
                    message = await receive()
                    received += len(message.get("body", b""))
                    if not message.get("more_body"):
                        break
                _close(receive)
            case "lost":

                async def swallow(message: Message) -> None:
                    pass

                await self.application(scope, receive, swallow)
                _close(receive)
            case "other":

                async def changed(message: Message) -> None:
                    body = message.get("body", b"")
                    await send({**message, "body": bytes([body[0] ^ 1]) + body[1:]} if body else message)

                await self.application(scope, receive, changed)
            case "slow":
                await asyncio.sleep(fault["seconds"])
                await self.application(scope, receive, send)

    async def _control(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["method"], scope["path"]:
            case "POST", "/_faults":
                self.state.faults = json.loads(await _body(receive))
            case "DELETE", "/_requests":
                self.state.requests.clear()
        await _answer(send, 200, {}, list(self.state.requests))


class FaultState:
    """What both servers, the Hub and its file storage, share."""

    def __init__(self) -> None:
        self.faults: list[dict[str, Any]] = []
        self.requests: list[str] = []

    def take(self, request: str) -> dict[str, Any] | None:
        for fault in self.faults:
            times = fault.get("times")
            if times != 0 and re.search(fault["request"], request):
                if times is not None:
                    fault["times"] = times - 1
                return fault
        return None


def _close(receive: Receive) -> None:
    """Resets the TCP connection; uvicorn keeps it beside `receive`."""
    receive.__self__.transport.abort()  # type: ignore[attr-defined]


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def _answer(send: Send, status: int, headers: dict[str, str], content: Any) -> None:
    body = json.dumps(content).encode()
    named = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in named.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
