"""Bearer tokens: a file of them, checked in constant time, and the interceptor that asks every call for one."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc

from asr_exit.errors import ConfigError
from service.errors import StreamError, abort

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0
_OPEN_TO_ALL = "/grpc.health.v1.Health/"  # probes carry no tokens
_SHORTEST = 16  # characters


class TokenFile:
    """Tokens, one a line, as TOKEN or NAME TOKEN; empty lines and lines that begin with # do not count.

    The name stands for the token in logs and limits; without one it is `line N`. Only digests are kept.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError when the file cannot be read or a line is no token."""
        self._path, self._clock = Path(path), clock
        self._looked_at, self._stamp = clock(), _stamp(self._path)
        self._digests = _read(self._path)

    def reload(self) -> None:
        """Read the file again. When that fails the tokens stay as they were, and the log says why."""
        try:
            self._stamp, self._digests = _stamp(self._path), _read(self._path)
            log.info("%d tokens read from %s", len(self._digests), self._path)
        except ConfigError as error:
            log.error("tokens not reloaded: %s", error)

    def owner(self, token: str) -> str | None:
        """The name of a token, None if there is no such token. Takes as long for a wrong one as for a right one."""
        now = self._clock()
        if now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            if _stamp(self._path) != self._stamp:
                self.reload()
        given, found = _digest(token), None
        for name, digest in self._digests:
            if hmac.compare_digest(given, digest):
                found = name
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _read(path: Path) -> list[tuple[str, bytes]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the tokens in {path}: {error}") from None
    digests = []
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) > 2 or len(parts[-1]) < _SHORTEST:
            raise ConfigError(
                f"{path}, line {number}: write TOKEN or NAME TOKEN, the token without blanks and at least "
                f"{_SHORTEST} characters long"
            )
        digests.append((parts[0] if len(parts) == 2 else f"line {number}", _digest(parts[-1])))
    if not digests:
        raise ConfigError(f"{path} holds no token: nobody could use the service")
    return digests


def bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The token in `authorization: Bearer TOKEN`."""
    for key, value in metadata:
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer" and token:
                return token.strip()
    return None


class Clients:
    """Tells clients apart: by token where tokens are asked for, else by address."""

    def __init__(self, tokens: TokenFile | None) -> None:
        self.tokens = tokens

    def identify(self, context: grpc.aio.ServicerContext) -> str:
        """A name for limits and logs."""
        if self.tokens is not None:
            token = bearer_token(context.invocation_metadata() or ())
            owner = None if token is None else self.tokens.owner(token)
            if owner is not None:
                return owner
        return context.peer().rpartition(":")[0]


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls without a valid token with UNAUTHENTICATED; health checks need none."""

    def __init__(self, tokens: TokenFile, on_refused: Callable[[str], None] = lambda reason: None) -> None:
        self._tokens, self._on_refused = tokens, on_refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_TO_ALL):
            return handler
        token = bearer_token(handler_call_details.invocation_metadata or ())
        if token is None:
            return self._refusal(handler, "no token: send the metadata `authorization: Bearer TOKEN`")
        if self._tokens.owner(token) is None:
            return self._refusal(handler, "this token is not valid here: check it, or ask for a new one")
        return handler

    def _refusal(self, handler: Any, message: str) -> grpc.RpcMethodHandler:
        """A handler of the same kind that only says no."""
        self._on_refused("token")
        error = StreamError(grpc.StatusCode.UNAUTHENTICATED, message)

        async def answer(_: object, context: grpc.aio.ServicerContext) -> None:
            await abort(context, error)

        async def stream(_: object, context: grpc.aio.ServicerContext) -> Any:
            await abort(context, error)
            yield

        kinds = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        make = kinds[handler.request_streaming, handler.response_streaming]
        return make(
            stream if handler.response_streaming else answer,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
