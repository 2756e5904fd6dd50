"""Streaming speech recognition that picks its depth for every chunk of audio."""
