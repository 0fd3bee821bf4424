"""The command: python -m fastbn demo | info | bench."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, backends


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastbn", description="Batch normalization on NumPy arrays, on the CPU, at the speed that memory allows."
    )
    parser.add_argument("--version", action="version", version=f"fastbn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train an MLP on images of digits with and without batch normalization")
    demo.add_argument("--quick", action="store_true", help="a few hundred steps, in seconds: shows that it runs")
    demo.add_argument(
        "--output", type=Path, default=Path("fastbn-demo.png"), help="where the picture goes (default: %(default)s)"
    )
    commands.add_parser("info", help="which backend, instruction set and threads are in use, and why")
    commands.add_parser("bench", help="the kernels' speed on this machine, in under a minute")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code: 0, 1 after an error, 130 after Ctrl-C."""
    try:
        options = _parser().parse_args(arguments)
        if options.command == "info":
            backends.show_config()
        elif options.command == "bench":
            from . import bench

            bench.main()
        else:
            from . import demo

            demo.main(quick=options.quick, output=options.output)
        sys.stdout.flush()  # here, where a full disk can still be reported
    except KeyboardInterrupt:
        print("\nfastbn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone: nothing to say, and no one to say it to
        _close_stdout()
        return 1
    except (ImportError, OSError, ValueError) as error:
        print(f"fastbn: {error}", file=sys.stderr)
        _close_stdout()
        return 1
    return 0


def _close_stdout() -> None:
    """Drop what standard output does not take, which would be an error again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
