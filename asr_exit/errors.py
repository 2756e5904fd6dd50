"""The exception tree. Every message says what to change."""

from __future__ import annotations


class AsrExitError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(AsrExitError, ValueError):
    """An option or configuration value is unknown, out of range, or contradicts another."""


class AudioError(AsrExitError, ValueError):
    """Audio that cannot be decoded or must not be recognised (wrong type, not finite, wrong rate)."""


class CheckpointError(AsrExitError):
    """A model file is missing, corrupt, or was not written by this package."""


class CapacityError(AsrExitError):
    """No slot is free; close a stream or start the engine with more slots."""


class StreamStateError(AsrExitError):
    """A stream was used after it was finished or closed."""


class EngineError(AsrExitError):
    """Computation failed for a stream; the stream is closed and its slot is free again."""
