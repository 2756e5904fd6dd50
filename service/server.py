"""Assembles the server: model, engine thread, RPCs, health, reflection; starts it, drains it, stops it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from functools import partial
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from asr_exit.buckets import BatchBuckets
from asr_exit.engine import Engine
from asr_exit.errors import ConfigError
from asr_exit.load_control import LoadController
from asr_exit.stream import StreamOptions
from asr_exit.torch_backend import TorchBackend
from service import wire
from service.admission import Admission
from service.allocator import give_back_freed_memory, reserve_heap, spare_what_stays
from service.auth import Clients, TokenFile, TokenInterceptor
from service.device import pick_device, pick_precision, usable_cores
from service.engine_thread import EngineThread, Event
from service.event_loop import EventLoop
from service.google_speech import google_handler
from service.language_model import ServedLanguageModel
from service.load import LoadMonitor
from service.metrics import Metrics
from service.pb import speech_pb2 as pb
from service.pb import speech_pb2_grpc
from service.reception import Reception
from service.riva import RivaServicer
from service.servicer import SpeechServicer
from service.tls import server_credentials
from service.turns import PromptCalls, Turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from asr_exit.checkpoint import Model
    from service.config import ServeConfig

log = logging.getLogger(__name__)
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Speech"].full_name
_CHUNK_CHOICES_MS = (160, 320, 640, 1280)
_TRANSPORT_LIMIT_BYTES = (
    16 << 20
)  # larger messages are refused by gRPC itself; smaller oversized ones with our own words
_CANCEL_GRACE_S = 1.0


class SpeechServer:
    """One served model. Everything but the engine thread runs on the event loop that `start` is called on."""

    def __init__(self, model: Model, config: ServeConfig, engine: Engine | None = None) -> None:
        """Raises ConfigError when the stream defaults do not fit the model, or the device is not there.

        `engine` is made from the configuration unless one is given; it belongs to the server from here on.
        """
        self._model = model
        self._config = config
        self.engines = [engine] if engine else [_make_engine(model, config) for _ in range(config.model.workers)]
        self._tokens = TokenFile(config.auth.tokens) if config.auth.tokens else None
        self._credentials = server_credentials(config.tls) if config.tls.certificate else None
        defaults = pb.StreamingConfig(encoding=pb.StreamingConfig.LINEAR16, sample_rate_hertz=16_000)
        self._stop_metrics: Callable[[], None] | None = None
        checked: StreamOptions = wire.parse_config(defaults, config.stream, model).options
        self._language_model = ServedLanguageModel(config.language_model)
        log.debug("stream defaults: %s", checked)

    async def start(self) -> int:
        """Listens, and returns the port. Raises ConfigError when the address cannot be bound."""
        loop = asyncio.get_running_loop()
        self.metrics = Metrics(self._model.config.exit_layers, self._config.limits.streams)
        monitors = [self._monitor() for _ in self.engines] if self._config.load.shed_depth else []
        turns = self._turns(loop)
        self._threads = [
            EngineThread(
                engine,
                poster(loop),
                load=monitors[index] if monitors else None,
                batching=self._config.batching,
                metrics=self.metrics,
                prepare=partial(self._prepare, engine),
                tidy=give_back_freed_memory,
                turns=turns,
            )
            for index, engine in enumerate(self.engines)
        ]
        admission = Admission(
            self._threads,
            self._config.limits,
            overloaded=lambda: bool(monitors) and all(monitor.overloaded for monitor in monitors),
            on_refused=self.metrics.refused,
        )
        self.reception = Reception(admission, Clients(self._tokens), self.metrics, self._config)
        choices = [ms for ms in _CHUNK_CHOICES_MS if _fits(self._model, ms)]
        description = wire.describe(self._model, self._config.stream, choices)
        self.servicer = SpeechServicer(self._model, self.reception, self._config, description, self._language_model)
        riva = RivaServicer(self._model, self._config.stream, self.servicer, choices)
        self._health = health.aio.HealthServicer()
        interceptors: list[grpc.aio.ServerInterceptor] = [PromptCalls(turns)] if turns else []
        if self._tokens:
            interceptors.append(TokenInterceptor(self._tokens, self.metrics.refused))
        self._server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                ("grpc.max_receive_message_length", _TRANSPORT_LIMIT_BYTES),
                ("grpc.keepalive_time_ms", 20_000),  # a client that vanished without a word is noticed
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.so_reuseport", 0),  # a port that is taken is an error
            ],
        )
        speech_pb2_grpc.add_SpeechServicer_to_server(self.servicer, self._server)
        google = google_handler(self._model, self._config.stream, self.servicer)
        self._server.add_generic_rpc_handlers((riva.handler(), google))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        listen = self._config.listen
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        try:
            address = f"{host}:{listen.port}"
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: is the port taken? ({error})") from None
        if self._config.metrics.port:
            self._stop_metrics = self.metrics.serve(self._config.metrics)
        for thread in self._threads:
            thread.start()
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return port

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuses new streams, lets running ones finish for `drain_s`, ends the rest, joins the engine thread."""
        self.reception.drain()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        deadline = asyncio.get_running_loop().time() + drain_s
        while self.reception.open_streams and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        self.reception.end_all()
        await self._server.stop(_CANCEL_GRACE_S)
        for thread in self._threads:
            await asyncio.to_thread(thread.stop)
        if self._stop_metrics:
            await asyncio.to_thread(self._stop_metrics)

    def reload(self) -> None:
        """Read the tokens again. Certificates are looked at before each handshake anyway."""
        if self._tokens:
            self._tokens.reload()

    def _monitor(self) -> LoadMonitor:
        costs = [self.engines[0].macs.to_exit(index, 1) for index in range(self._model.config.num_exits)]
        return LoadMonitor(LoadController(len(costs), self._config.load.target_latency_ms, costs=costs))

    def _turns(self, loop: asyncio.AbstractEventLoop) -> Turns | None:
        """With the loop, if the engines leave it no core."""
        model = self._config.model
        needed = len(self.engines) * model.threads
        if not isinstance(loop, EventLoop) or pick_device(model.device) != "cpu" or usable_cores() > needed:
            return None
        turns = Turns(len(self.engines))
        loop.take_turns(turns)
        return turns

    def _prepare(self, engine: Engine) -> None:
        """On the thread that runs the engine."""
        import torch

        torch.set_num_threads(self._config.model.threads)  # counts for the calling thread, and so do kernels
        if isinstance(engine.backend, TorchBackend):
            chunk_frames = self._model.config.chunk_frames(self._config.stream.chunk_ms)
            engine.backend.warm_up(chunk_frames, self._config.batching.max_batch)
        reserve_heap()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", SERVICE_NAME):
            await self._health.set(service, status)


async def run(model: Model, config: ServeConfig, announce: Callable[[int], None]) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the draining. `announce` gets the port."""
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    _let_steps_run()
    server = SpeechServer(model, config)
    announce(await server.start())
    spare_what_stays()
    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, server.reload)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await first.wait()
    stopping = asyncio.create_task(server.stop(config.listen.drain_s))
    impatient = asyncio.create_task(second.wait())
    await asyncio.wait({stopping, impatient}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        server.reception.end_all()
    await stopping
    impatient.cancel()


def _let_steps_run() -> None:
    """Messages do not interrupt an engine step on a busy core: threads made from now on wait for their turn.

    Otherwise every message of every stream costs the step two switches between threads. Where a core is idle nothing
    waits.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _make_engine(model: Model, config: ServeConfig) -> Engine:
    device = pick_device(config.model.device)
    slots = -(-config.limits.streams // config.model.workers)
    model = model.in_precision(pick_precision(config.model.precision, device))
    buckets = BatchBuckets(config.model.batch_buckets) if device == "cuda" else None
    backend = model.backend(slots, device, buckets=buckets, cuda_graphs=config.model.cuda_graphs)
    return Engine(model, slots=slots, device=device, backend=backend)


def _fits(model: Model, chunk_ms: int) -> bool:
    try:
        model.config.chunk_frames(chunk_ms)
    except ConfigError:
        return False
    return True


def poster(loop: asyncio.AbstractEventLoop) -> Callable[[list[Event]], None]:
    """Returns a function, callable from any thread, that runs events on `loop`; one that raises is only logged."""

    def deliver(events: list[Event]) -> None:
        for event in events:
            try:
                event()
            except Exception:
                log.exception("delivering an event failed")

    def post(events: list[Event]) -> None:
        loop.call_soon_threadsafe(deliver, events)

    return post
