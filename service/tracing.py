"""OpenTelemetry spans where its API is installed, and nothing where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

_INSTALLED = find_spec("opentelemetry") is not None and find_spec("opentelemetry.trace") is not None


class Span(Protocol):
    """What callers use of a span."""

    def set_attribute(self, key: str, value: str | int | float) -> Any:
        """Add to what the span says."""


class _NoSpan:
    def set_attribute(self, key: str, value: str | int | float) -> None:
        return None


@contextmanager
def span(name: str, attributes: Mapping[str, str | int | float]) -> Iterator[Span]:
    """A span of the tracer "asr_exit" around the block; the exporter is the application's to set up."""
    if not _INSTALLED:
        yield _NoSpan()
        return
    tracer = import_module("opentelemetry.trace").get_tracer("asr_exit")
    with tracer.start_as_current_span(name, attributes=dict(attributes)) as current:
        yield current
