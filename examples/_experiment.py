"""What the experiments have in common: command line, tables, claims, picture, and their place in docs/experiments.md.

An experiment is a script with a function ``main(report)`` that ends in ``run(main)``. It prints what it finds as
tables, says of each claim whether it holds, and draws one picture. A full run also writes its tables into
docs/experiments.md and its picture into docs/figures/; with --quick, seconds on less data, nothing is written but a
picture of that kind (docs/figures/NAME-quick.png, which git does not keep).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from threadpoolctl import threadpool_limits

DOCS = Path(__file__).resolve().parent.parent / "docs"


class Report:
    """Where an experiment's findings go.

    Attributes
    ----------
    name : str
        The script's.
    quick : bool
        Whether to do with seconds instead of minutes.
    """

    def __init__(self, name: str, *, quick: bool, figures: Path) -> None:
        self.name = name
        self.quick = quick
        self.surprises: list[str] = []
        self._figures = figures
        self._blocks: list[str] = []

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table. Numbers come as text, rounded as the experiment thinks right."""
        cells = [list(header), *([str(cell) for cell in row] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        lines = []
        for first, *others in cells:
            padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append([first.ljust(widths[0]), *padded])
        print(f"\n{title}\n" + "\n".join("  ".join(line).rstrip() for line in lines), flush=True)
        rule = ["---", *(["---:"] * (len(header) - 1))]
        self._blocks.append(
            "\n".join([f"{title}:", "", *(f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]])])
        )

    def claim(self, text: str, holds: bool, *, expected: bool | None = True) -> None:
        """Say whether a claim holds in this run.

        Parameters
        ----------
        text : str
            A sentence that is true if the claim holds.
        holds : bool
        expected : bool or None
            What we found, and what the script asserts: it ends with status 1 where the answer is another. False: the
            claim does not hold here, and docs/experiments.md says so. None: too close to call (or too short a run),
            not asserted.
        """
        answer = "holds" if holds else "does not hold"
        print(f"\n{text} — {answer}", flush=True)
        self._blocks.append(f"- {text} **{answer.capitalize()}.**")
        if expected is not None and bool(holds) is not expected:
            self.surprises.append(text)

    def picture(self, figure: Any) -> None:
        """Save a matplotlib Figure as docs/figures/NAME.png."""
        self._figures.mkdir(parents=True, exist_ok=True)
        path = self._figures / f"{self.name}{'-quick' if self.quick else ''}.png"
        figure.savefig(path, dpi=100)
        print(f"\nPicture: {path}", flush=True)

    def write(self) -> None:
        """Put tables and claims between this experiment's marks in docs/experiments.md."""
        path = DOCS / "experiments.md"
        begin, end = f"<!-- {self.name}: begin -->", f"<!-- {self.name}: end -->"
        before, found, rest = path.read_text().partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{path} has no place for {self.name}: it must hold {begin} and {end}")
        text = "\n\n".join(self._blocks).replace(".**\n\n- ", ".**\n- ")
        path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def run(main: Callable[[Report], None]) -> None:
    """The script's command line: ``python examples/NAME.py [--quick] [--figures FOLDER]``."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: less data, fewer steps")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="where the picture goes (docs/figures)")
    given = parser.parse_args()
    report = Report(Path(sys.argv[0]).stem, quick=given.quick, figures=given.figures or DOCS / "figures")
    start = perf_counter()
    # The same sums on every run; and products this small gain nothing from a second thread.
    with threadpool_limits(1, user_api="blas"):
        main(report)
    print(f"\n{perf_counter() - start:.0f} seconds", flush=True)
    if not report.quick and given.figures is None:
        report.write()
    for text in report.surprises:
        print(f"Not as found before: {text}", file=sys.stderr)
    sys.exit(1 if report.surprises else 0)
