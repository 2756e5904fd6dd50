"""How failures look on the wire: one status code and one message that says what to change."""

from __future__ import annotations

from typing import NoReturn

import grpc
from google.protobuf.message import DecodeError

from asr_exit.errors import AudioError, CapacityError, ConfigError, StreamStateError


class StreamError(Exception):
    """Ends one stream with a gRPC status; other streams are not affected.

    `retry_after_ms` tells the client when to try again: as `grpc-retry-pushback-ms`, which gRPC's own retries obey, and
    as `retry-after-ms` for everybody else.
    """

    def __init__(self, code: grpc.StatusCode, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_ms = retry_after_ms

    @property
    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with the status."""
        if self.retry_after_ms is None:
            return ()
        value = str(self.retry_after_ms)
        return (("retry-after-ms", value), ("grpc-retry-pushback-ms", value))


async def abort(context: grpc.aio.ServicerContext, error: StreamError) -> NoReturn:
    """Ends a call with the error's status, message and retry hint."""
    metadata = (*context.trailing_metadata(), *error.trailing_metadata)
    # the frames of the traceback hold the stream's buffers and the error itself: memory only the collector would free
    error.__traceback__ = error.__cause__ = error.__context__ = None
    await context.abort(error.code, error.message, trailing_metadata=metadata)
    raise AssertionError("abort raises")


def invalid(message: str) -> StreamError:
    """Returns the error for a request the client has to change."""
    return StreamError(grpc.StatusCode.INVALID_ARGUMENT, message)


def undecodable() -> StreamError:
    """Returns the error for bytes that are not the message that belongs there."""
    return invalid("a message could not be decoded: check that client and server use the same proto file")


def to_stream_error(error: BaseException) -> StreamError:
    """Maps any exception to the status the client sees. Unknown ones become INTERNAL without their details."""
    if isinstance(error, StreamError):
        return error
    if isinstance(error, ConfigError | AudioError):
        return invalid(str(error))
    if isinstance(error, DecodeError):
        return undecodable()
    if isinstance(error, CapacityError):
        return StreamError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{error} (all stream slots are taken: try again later)")
    if isinstance(error, StreamStateError):
        return StreamError(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    return StreamError(
        grpc.StatusCode.INTERNAL,
        f"recognition failed for this stream ({type(error).__name__}); other streams go on. Open a new stream.",
    )
