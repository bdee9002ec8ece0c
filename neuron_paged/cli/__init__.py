# SPDX-License-Identifier: Apache-2.0
"""The command `neuron-paged`: picks a subcommand and turns its outcome into an exit code.

Each subcommand is a module with `add_arguments(parser)` and `run(args) -> int`, imported only when it is used, so
that `neuron-paged --help` does not wait for torch.
Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted (SIGINT), 143 terminated (SIGTERM), 141 the reader
of our output went away.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import NoReturn, Protocol, cast

from neuron_paged import __version__
from neuron_paged.errors import NeuronPagedError

PROGRAM = "neuron-paged"

# name: (module, one line for --help)
COMMANDS = {
    "generate": ("neuron_paged.cli.generate", "generate text from prompts"),
    "compile": ("neuron_paged.cli.compile_command", "compile a model's graphs into a store, ahead of serving"),
    "bundle": ("neuron_paged.cli.bundle", "compiled graphs: ls, verify, push, pull, diff, export, import"),
    "bench": (
        "neuron_paged.cli.bench",
        "benchmarks: throughput, latency, kv-utilisation, engine, tensor-parallel, kernels, buckets",
    ),
    "plan-buckets": ("neuron_paged.cli.plan_buckets", "from a traffic trace to the graphs worth compiling"),
    "kernels": ("neuron_paged.cli.kernels", "NKI kernels: run in the simulator, profile, calibrate, lint"),
    "doctor": ("neuron_paged.cli.doctor", "versions, devices, and which backend would be used and why"),
}


class Command(Protocol):
    """What a subcommand module offers. Its docstring is the text above the options in `--help`."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class Parser(argparse.ArgumentParser):
    """argparse, with usage errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see `{self.prog} --help`)\n")


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that nothing but `main` and `finally` blocks reacts to it."""


def _on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND [OPTIONS]",
        description="Paged attention and continuous batching for AWS Trainium and Inferentia, and for any CPU.",
        epilog=f"commands:\n{listing}\n\n`{PROGRAM} COMMAND --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser


def _dispatch(argv: Sequence[str]) -> int:
    if not argv:
        _overview().print_help()
        return 2
    name = argv[0]
    if name.startswith("-"):
        _overview().parse_args(argv)  # --help and --version leave through SystemExit
        raise AssertionError("unreachable: the overview has no other option")
    if name not in COMMANDS:
        _overview().error(f"unknown command {name!r}; need one of {', '.join(COMMANDS)}")
    command = cast(Command, import_module(COMMANDS[name][0]))
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv[1:]))


def _run(argv: Sequence[str]) -> int:
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
        return code
    except NeuronPagedError as error:
        message = " ".join(str(error).split())
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Terminated:
        print(f"{PROGRAM}: terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        # The reader (`| head`) is gone. Point stdout elsewhere, or the interpreter complains while shutting down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's arguments) and return the exit code."""
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a model's text must not break a terminal that is not UTF-8
            stream.reconfigure(errors="replace")
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    finally:
        signal.signal(signal.SIGTERM, previous)
