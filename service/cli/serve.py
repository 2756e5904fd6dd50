"""`asr-exit serve`: the gRPC server."""

from __future__ import annotations

import argparse
import os

_KEPT_BY_A_THREAD_BYTES = 1 << 20  # beside the engines' own: gRPC's threads are many
_HEAPS_OF_OTHERS = 3

HELP = "serve gRPC until SIGTERM or Ctrl-C"
_OPTIONS = {  # option -> table and key of the configuration
    "host": ("listen", "host"),
    "port": ("listen", "port"),
    "insecure": ("listen", "insecure"),
    "tls_cert": ("tls", "certificate"),
    "tls_key": ("tls", "key"),
    "tls_client_ca": ("tls", "client_ca"),
    "tokens": ("auth", "tokens"),
    "model": ("model", "path"),
    "lm": ("language_model", "path"),
    "device": ("model", "device"),
    "threads": ("model", "threads"),
    "workers": ("model", "workers"),
    "precision": ("model", "precision"),
    "streams": ("limits", "streams"),
    "metrics_port": ("metrics", "port"),
    "log_format": ("log", "format"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options override the file given with --config."""
    parser.add_argument("--config", metavar="FILE.toml", help="settings; see service/config.py for all of them")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for a free one (default: 50051)")
    parser.add_argument("--insecure", action="store_true", default=None, help="allow any host, unencrypted")
    parser.add_argument("--tls-cert", metavar="PEM", help="certificate of this server; with --tls-key turns TLS on")
    parser.add_argument("--tls-key", metavar="PEM", help="its private key")
    parser.add_argument("--tls-client-ca", metavar="PEM", help="mutual TLS: whose clients may connect")
    parser.add_argument("--tokens", metavar="FILE", help="ask every call for one of the tokens in FILE, one a line")
    parser.add_argument("--model", metavar="FILE", help="model file (default: the bundled one)")
    parser.add_argument(
        "--lm", metavar="FILE", help="language model for all streams: a file, or `bundled` (default: none)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: auto")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each engine (default: 1)")
    parser.add_argument("--workers", type=int, metavar="N", help="engines, one a core to use (default: 1)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="default: auto")
    parser.add_argument("--streams", type=int, metavar="N", help="most streams at once (default: 64)")
    parser.add_argument("--metrics-port", type=int, metavar="N", help="Prometheus figures on this port of loopback")
    parser.add_argument("--log-format", choices=("text", "json"), help="default: text")


def run(arguments: argparse.Namespace) -> int:
    """Loads the model and serves."""
    from service.config import load_config

    overrides: dict[str, dict[str, object]] = {}
    for option, (table, key) in _OPTIONS.items():
        if (value := getattr(arguments, option)) is not None:
            overrides.setdefault(table, {})[key] = value
    config = load_config(arguments.config, overrides)
    # oneDNN keeps 1024 kernels: at early exits a server meets more sizes of batch than that, and would make them anew
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")

    from asr_exit.checkpoint import load
    from asr_exit.processor import computes_in_bf16
    from service import logs
    from service.allocator import keep_freed_memory, share_heaps
    from service.device import pick_device, pick_precision
    from service.event_loop import run as run_loop
    from service.server import run as serve

    logs.set_up(config.log)
    keep_freed_memory(_KEPT_BY_A_THREAD_BYTES)
    share_heaps(config.model.workers + _HEAPS_OF_OTHERS)
    device = pick_device(config.model.device)
    model = load(config.model.path or None, device)

    def announce(port: int) -> None:
        layers = ", ".join(map(str, model.config.exit_layers))
        precision = pick_precision(config.model.precision, device)
        slow = precision == "bf16" and not computes_in_bf16(device)
        advice = " (emulated by this processor: fp32 is faster)" if slow else ""
        print(f"model {model.name} on {device} in {precision}{advice}, exits after layers {layers}", flush=True)
        print(f"listening on {config.listen.host}:{port}", flush=True)

    run_loop(serve(model, config, announce))
    print("stopped", flush=True)
    return 0
