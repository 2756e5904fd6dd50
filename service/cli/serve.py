"""`asr-exit serve`: the gRPC server."""

from __future__ import annotations

import argparse

HELP = "serve gRPC until SIGTERM or Ctrl-C"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options override the file given with --config."""
    parser.add_argument("--config", metavar="FILE.toml", help="settings; see service/config.py for all of them")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for a free one (default: 50051)")
    parser.add_argument("--insecure", action="store_true", default=None, help="allow a host beyond this machine")
    parser.add_argument("--model", metavar="FILE", help="model file (default: the bundled one)")
    parser.add_argument("--lm", metavar="FILE", help="language model for all streams (default: none)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: auto")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of the engine (default: 1)")
    parser.add_argument("--streams", type=int, metavar="N", help="most streams at once (default: 64)")


def run(arguments: argparse.Namespace) -> int:
    """Loads the model and serves."""
    from service.config import load_config

    given = {
        "listen": {"host": arguments.host, "port": arguments.port, "insecure": arguments.insecure},
        "model": {"path": arguments.model, "device": arguments.device, "threads": arguments.threads},
        "limits": {"streams": arguments.streams},
        "language_model": {"path": arguments.lm},
    }
    overrides = {
        table: {key: value for key, value in pairs.items() if value is not None} for table, pairs in given.items()
    }
    config = load_config(arguments.config, overrides)

    import asyncio
    import logging

    from asr_exit.checkpoint import load
    from service.device import pick_device
    from service.server import run as serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    device = pick_device(config.model.device)
    model = load(config.model.path or None, device)

    def announce(port: int) -> None:
        layers = ", ".join(map(str, model.config.exit_layers))
        print(f"model {model.name} on {device}, exits after layers {layers}", flush=True)
        print(f"listening on {config.listen.host}:{port}", flush=True)

    asyncio.run(serve(model, config, announce))
    print("stopped", flush=True)
    return 0
