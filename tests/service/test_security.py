"""Encryption, certificates of both sides and tokens, each over a real socket."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from asr_exit.checkpoint import Model
from asr_exit.errors import ConfigError
from service.auth import TokenFile, bearer_token
from service.background import BackgroundServer
from service.client import Access, ServiceError, SpeechClient
from service.config import load_config
from tests.conftest import babble
from tests.service.conftest import parts, pcm16, serve_config

DATA = pcm16(babble(1.0))
TOKEN, OTHER = "correct-horse-battery", "staple-tent-gravel-7"


class Pki:
    """An authority of its own and files signed by it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.authority = folder, trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, not_after: datetime | None = None) -> tuple[str, str]:
        """Certificate and key for 127.0.0.1."""
        issued = self.authority.issue_cert(
            "127.0.0.1", not_before=datetime.now(UTC) - timedelta(days=9), not_after=not_after
        )
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return str(certificate), str(key)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def recognise(address: str, access: Access) -> str:
    """The status a stream ends with."""
    with SpeechClient(address, access) as client:
        try:
            assert list(client.stream(parts(DATA)))[-1].is_final
        except ServiceError as error:
            return error.code
    return "OK"


def test_tls(model: Model, pki: Pki, tmp_path: Path) -> None:
    certificate, key = pki.issue("server")
    stranger = Pki(tmp_path)
    with BackgroundServer(model, serve_config(tls={"certificate": certificate, "key": key})) as server:
        assert recognise(server.address, Access(ca=str(pki.ca))) == "OK"
        assert recognise(server.address, Access(ca=str(stranger.ca))) == "UNAVAILABLE"
        assert recognise(server.address, Access(tls=True)) == "UNAVAILABLE"
        assert recognise(server.address, Access()) == "UNAVAILABLE"


def test_mutual_tls(model: Model, pki: Pki, tmp_path: Path) -> None:
    certificate, key = pki.issue("server")
    mine, foreign = pki.issue("client"), Pki(tmp_path).issue("client")
    expired = pki.issue("expired-client", datetime.now(UTC) - timedelta(hours=1))
    tables = {"certificate": certificate, "key": key, "client_ca": str(pki.ca)}
    with BackgroundServer(model, serve_config(tls=tables)) as server:
        assert recognise(server.address, Access(ca=str(pki.ca), certificate=mine[0], key=mine[1])) == "OK"
        assert recognise(server.address, Access(ca=str(pki.ca))) == "UNAVAILABLE"
        for pair in (foreign, expired):
            access = Access(ca=str(pki.ca), certificate=pair[0], key=pair[1])
            assert recognise(server.address, access) == "UNAVAILABLE"


def test_an_expired_certificate_is_refused_and_its_successor_taken_without_a_restart(model: Model, pki: Pki) -> None:
    certificate, key = pki.issue("renewed", datetime.now(UTC) - timedelta(hours=1))
    with BackgroundServer(model, serve_config(tls={"certificate": certificate, "key": key})) as server:
        assert recognise(server.address, Access(ca=str(pki.ca))) == "UNAVAILABLE"
        pki.issue("renewed")
        assert recognise(server.address, Access(ca=str(pki.ca))) == "OK"


def test_tokens(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# who may\nalice {TOKEN}\n")
    with BackgroundServer(model, serve_config(auth={"tokens": str(path)})) as server:
        assert recognise(server.address, Access(token=TOKEN)) == "OK"
        assert recognise(server.address, Access(token=TOKEN + "x")) == "UNAUTHENTICATED"
        assert recognise(server.address, Access()) == "UNAUTHENTICATED"
        with SpeechClient(server.address) as client, pytest.raises(ServiceError, match="authorization: Bearer"):
            client.model()
        with grpc.insecure_channel(server.address) as channel:  # probes need none
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        path.write_text(f"bob {OTHER}\n")
        server.server.reload()
        assert recognise(server.address, Access(token=TOKEN)) == "UNAUTHENTICATED"
        assert recognise(server.address, Access(token=OTHER)) == "OK"


def test_a_changed_token_file_is_noticed_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    now = [0.0]
    path = tmp_path / "tokens"
    path.write_text(TOKEN)
    tokens = TokenFile(path, clock=lambda: now[0])
    assert (tokens.owner(TOKEN), tokens.owner(OTHER)) == ("line 1", None)
    path.write_text(f"\nbob {OTHER}\n")
    assert tokens.owner(OTHER) is None  # looked a moment ago
    now[0] += 2.0
    assert (tokens.owner(OTHER), tokens.owner(TOKEN)) == ("bob", None)
    path.write_text("short\n")
    os.utime(path, ns=(1, 1))
    now[0] += 2.0
    assert tokens.owner(OTHER) == "bob"
    assert TOKEN not in repr(vars(tokens))


@pytest.mark.parametrize("text", ["", "# nobody\n", "name a-token-that-is-long and-more\n", "tooshort\n"])
def test_token_files_with_mistakes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        TokenFile(path)


@pytest.mark.parametrize(
    ("value", "token"), [("Bearer abc", "abc"), ("bearer abc", "abc"), ("Basic abc", None), ("abc", None)]
)
def test_only_bearer_tokens_count(value: str, token: str | None) -> None:
    assert bearer_token([("other", "Bearer x"), ("authorization", value)]) == token


def test_half_a_configuration_is_an_error(pki: Pki, tmp_path: Path) -> None:
    certificate, key = pki.issue("server")
    for tables in ({"certificate": certificate}, {"client_ca": str(pki.ca)}):
        with pytest.raises(ConfigError, match=r"belong together|needs tls"):
            load_config(None, {"tls": tables})
    with pytest.raises(ConfigError, match="--tls-cert"):
        load_config(None, {"listen": {"host": "0.0.0.0"}, "auth": {"tokens": "any"}})
    assert load_config(None, {"listen": {"host": "0.0.0.0"}, "tls": {"certificate": certificate, "key": key}})
    with pytest.raises(ConfigError, match="cannot read"):
        SpeechClient("localhost:1", Access(ca=str(tmp_path / "none.pem")))
