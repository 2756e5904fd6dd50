"""Graphs of an exported model, each loaded and checked when it is first needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from asr_exit.edge.manifest import GraphFile, digest
from asr_exit.errors import CheckpointError


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Settings for a small device: no idle threads that spin, no arena that holds on to memory."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False  # the last chunk of a stream has another shape
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class GraphSessions:
    """ONNX Runtime sessions by file, shared by all streams of a model."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder, self._threads = folder, threads
        self._sessions: dict[str, tuple[onnxruntime.InferenceSession, list[str]]] = {}
        self.bytes_read = 0

    @property
    def loaded(self) -> tuple[str, ...]:
        """Files that are in memory."""
        return tuple(self._sessions)

    def run(self, graph: GraphFile, feeds: Mapping[str, np.ndarray], skip: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Outputs by name, without those in `skip`.

        Raises:
            CheckpointError: the graph's file is missing, damaged, or not what the manifest describes.
        """
        session, names = self.load(graph)
        wanted = [name for name in names if name not in skip] if skip else names
        return dict(zip(wanted, session.run(wanted, feeds), strict=True))

    def load(self, graph: GraphFile) -> tuple[onnxruntime.InferenceSession, list[str]]:
        """Session and names of outputs; from the disk where it is not in memory yet. Errors as in `run`."""
        if (known := self._sessions.get(graph.file)) is not None:
            return known
        path = self._folder / graph.file
        try:
            found = digest(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}); export the model again") from error
        if found != graph.sha256:
            raise CheckpointError(f"{path} is not the file that its manifest describes; export the model again")
        try:
            session = onnxruntime.InferenceSession(
                str(path), session_options(self._threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no common base
            raise CheckpointError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}") from error
        self.bytes_read += graph.bytes
        entry = session, [output.name for output in session.get_outputs()]
        self._sessions[graph.file] = entry
        return entry
