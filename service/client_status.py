"""How a call ended, as the clients tell it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

import grpc


class ServiceError(Exception):
    """The server ended a call: `code` is the name of the gRPC status, the message says what to change."""

    def __init__(self, code: str, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after_ms = retry_after_ms  # the server's hint, where it gave one


def service_error(error: grpc.RpcError) -> ServiceError:
    """What a failed call tells."""
    return _as_service_error(error.code(), error.details(), error.trailing_metadata())


class ServersEnd:
    """How the server ended an asyncio call, where grpc.aio forgets it.

    A write that fails because the call has ended sets the status to INTERNAL, before or after the server's own
    is set (github.com/grpc/grpc/issues/36066).
    """

    _OVERWRITTEN = "Internal error from Core"
    _WAIT_S = 1.0  # for the server's status after a failed write; it is on its way, or Core will not deliver one

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self._known: asyncio.Future[ServiceError] = asyncio.get_running_loop().create_future()
        call.add_done_callback(self._status_set)

    def _status_set(self, call: grpc.aio.StreamStreamCall) -> None:
        # The status is there, so the call's coroutines return at once.
        end = _as_service_error(*(_result_of(get()) for get in (call.code, call.details, call.trailing_metadata)))
        if not self._known.done() and end.message != self._OVERWRITTEN:
            self._known.set_result(end)

    async def failure(self, error: grpc.RpcError) -> ServiceError | None:
        """The server's status where there is one, `error` otherwise. None: the server ended the call without error."""
        try:
            end = await asyncio.wait_for(self._known, self._WAIT_S)
        except TimeoutError:
            end = service_error(error)
        return None if end.code == "OK" else end


def _result_of(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    raise RuntimeError("the call is not done")


def _as_service_error(
    code: grpc.StatusCode, details: str | None, metadata: Iterable[tuple[str, str | bytes]] | None
) -> ServiceError:
    hint = dict(metadata or ()).get("retry-after-ms")
    return ServiceError(code.name, details or "no details", int(hint) if hint else None)
