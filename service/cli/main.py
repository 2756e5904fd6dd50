"""Entry point of `asr-exit`: finds the subcommand, turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

COMMANDS = ("demo", "serve", "stream", "transcribe", "evaluate", "calibrate", "export", "bench")
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Importing the subcommands is cheap: they import what they need when they run."""
    parser = argparse.ArgumentParser(
        prog="asr-exit",
        description="Streaming speech recognition that decides for every chunk of audio how deep to go.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"service.cli.{name}")
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: end without a traceback
        return EXIT_FAILED
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"asr-exit {arguments.command}: {error}", file=sys.stderr)
        return EXIT_FAILED


def _is_expected(error: Exception) -> bool:
    from asr_exit.errors import AsrExitError

    if isinstance(error, AsrExitError):
        return True
    client = sys.modules.get("service.client")
    return client is not None and isinstance(error, client.ServiceError)


if __name__ == "__main__":
    raise SystemExit(main())
