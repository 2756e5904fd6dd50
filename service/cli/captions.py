"""Captions in the terminal: partials rewritten in place, finals committed, the depth of each chunk as a small bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from service.cli.tally import mean_exit_layer, real_chunks

if TYPE_CHECKING:
    from service.results import Caption, ChunkDepth

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "12345678"
_SHOWN_BARS = 48


class CaptionView(Protocol):
    """Shows captions as they come; a context manager."""

    def __enter__(self) -> CaptionView: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, caption: Caption) -> None:
        """Takes the next caption of the stream."""


def caption_view(exit_layers: Sequence[int], *, as_json: bool = False, file: TextIO | None = None) -> CaptionView:
    """The view that fits: JSON lines, a live display on a terminal, or plain lines anywhere else."""
    file = file or sys.stdout
    if as_json:
        return JsonView(file)
    return LiveView(exit_layers) if file.isatty() else PlainView(exit_layers, file)


def depth_bar(chunks: Sequence[ChunkDepth], exit_layers: Sequence[int], bars: str = BARS) -> str:
    """One character for each chunk, from the lowest for the first exit to the highest for the last."""
    scale = (len(bars) - 1) / max(1, len(exit_layers) - 1)
    heights = {layer: bars[round(scale * index)] for index, layer in enumerate(exit_layers)}
    return "".join(heights[chunk.exit_layer] for chunk in chunks)


class _View:
    def __enter__(self) -> CaptionView:
        return self  # type: ignore[return-value]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class JsonView(_View):
    """One JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def show(self, caption: Caption) -> None:
        values = {"type": "final" if caption.is_final else "interim"} | asdict(caption)
        print(json.dumps(values), file=self._file, flush=True)


class PlainView(_View):
    """Final captions only, a line each."""

    def __init__(self, exit_layers: Sequence[int], file: TextIO) -> None:
        self._exit_layers = exit_layers
        self._file = file
        self._bars = BARS if _can_print(BARS, file) else ASCII_BARS
        self._chunks: list[ChunkDepth] = []

    def show(self, caption: Caption) -> None:
        self._chunks += real_chunks(caption.chunks)
        if caption.is_final and caption.text:
            parts = final_parts(caption, self._chunks, self._exit_layers, self._bars)
            print(*parts, sep="  ", file=self._file, flush=True)
            self._chunks = []


class LiveView(_View):
    """Finals scroll up; below them the running caption and the depth of its chunks are rewritten in place."""

    def __init__(self, exit_layers: Sequence[int]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._exit_layers = exit_layers
        self._console = Console(highlight=False)
        self._bars = BARS if _can_print(BARS, sys.stdout) else ASCII_BARS
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._chunks: list[ChunkDepth] = []

    def __enter__(self) -> CaptionView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, caption: Caption) -> None:
        from rich.text import Text

        self._chunks += real_chunks(caption.chunks)
        if not caption.is_final:
            tail = caption.text[len(caption.committed) :]
            depth = self._depth_line(caption)
            shown = Text.assemble((caption.committed, "bold"), (tail, "italic dim"), "\n", (depth, "cyan"))
            self._live.update(shown, refresh=True)
            return
        self._live.update(Text(""), refresh=True)
        if caption.text:
            stamp, text, depth = final_parts(caption, self._chunks, self._exit_layers, self._bars)
            self._console.print(Text.assemble((stamp, "dim"), "  ", (text, "bold"), "  ", (depth, "cyan")))
            self._chunks = []

    def _depth_line(self, caption: Caption) -> str:
        if not self._chunks:
            return ""
        newest = self._chunks[-1]
        bar = depth_bar(self._chunks[-_SHOWN_BARS:], self._exit_layers, self._bars)
        return (
            f"{bar}  layer {newest.exit_layer}/{self._exit_layers[-1]} ({newest.decision}), {caption.latency_ms:.0f} ms"
        )


def final_parts(
    caption: Caption, chunks: Sequence[ChunkDepth], exit_layers: Sequence[int], bars: str
) -> tuple[str, str, str]:
    """Time, text, and the depth of the chunks since the last final."""
    depth = f"{depth_bar(chunks, exit_layers, bars)}  mean layer {mean_exit_layer(chunks):.1f}"
    return f"[{caption.end_ms / 1000:6.2f} s]", caption.text, depth


def _can_print(text: str, file: TextIO) -> bool:
    try:
        text.encode(getattr(file, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True
