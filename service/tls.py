"""Certificates of the server and of clients. Files that changed count from the next connection on."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from asr_exit.errors import ConfigError

if TYPE_CHECKING:
    from service.config import TlsConfig

log = logging.getLogger(__name__)


def server_credentials(config: TlsConfig) -> grpc.ServerCredentials:
    """Raises ConfigError when a file cannot be read."""
    watched = _Files(config)
    return grpc.dynamic_ssl_server_credentials(
        watched.read(), watched.changed, require_client_authentication=bool(config.client_ca)
    )


def channel_credentials(ca: str = "", certificate: str = "", key: str = "") -> grpc.ChannelCredentials:
    """A client's side: files with the CAs to trust (empty: the usual ones), and its own certificate for mutual TLS.

    Raises ConfigError when a file cannot be read, or only one of certificate and key is given.
    """
    if bool(certificate) != bool(key):
        raise ConfigError("--tls-cert and --tls-key belong together: give both")
    return grpc.ssl_channel_credentials(*(_read(path) if path else None for path in (ca, key, certificate)))


class _Files:
    """The server's files, and what they looked like when they were last read."""

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._paths = [path for path in (config.certificate, config.key, config.client_ca) if path]
        self._stamps = self._look()

    def _look(self) -> list[int]:
        try:
            return [os.stat(path).st_mtime_ns for path in self._paths]
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from None

    def read(self) -> grpc.ServerCertificateConfiguration:
        pair = (_read(self._config.key), _read(self._config.certificate))
        roots = _read(self._config.client_ca) if self._config.client_ca else None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake; None = as before."""
        try:
            stamps = self._look()
            if stamps == self._stamps:
                return None
            fresh = self.read()
        except ConfigError as error:
            log.error("certificates not reloaded: %s", error)
            return None
        self._stamps = stamps
        log.info("certificates reloaded from %s", self._config.certificate)
        return fresh


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
