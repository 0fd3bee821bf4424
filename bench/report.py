"""A benchmark run as tables and a picture: python bench/report.py RUN.json

Writes docs/figures/performance.png (time over floor, a bar for each library, a panel for each operation and layout) and
the tables between the marks in docs/performance.md: the kernels', the training steps' and the scaler's, each if the run
has them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from math import exp, isnan, log, nan
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from shapes import LAYOUTS, RESNET50

DOCS = Path(__file__).parent.parent / "docs"
MARKS = {
    "kernels": ("<!-- table: bench/report.py -->", "<!-- end of table -->"),
    "training": ("<!-- training: bench/report.py -->", "<!-- end of training -->"),
    "scaler": ("<!-- scaler: bench/report.py -->", "<!-- end of scaler -->"),
}
OPERATIONS = {"forward": "train forward", "normalize": "eval", "backward": "backward"}
COLORS = {
    "fastbn": "#c4451c", "fastbn called": "#e39a7f", "torch": "#4a6fa5", "torch out": "#8fa8cc", "oneDNN": "#5b8c5a",
    "jax": "#7d5ba6", "jax out": "#b49fd0", "NumPy": "#999999",
}  # fmt: skip
# Asked for: time over floor, geometric mean and ResNet-50's total; torch's time over ours, NCHW and NHWC.
FLOOR_TARGETS = {
    ("forward", "NCHW"): (1.9, 1.5), ("forward", "NHWC"): (1.9, 1.7), ("normalize", "NCHW"): (1.1, 1.05),
    ("normalize", "NHWC"): (1.1, 1.05), ("backward", "NCHW"): (1.7, 1.4), ("backward", "NHWC"): (1.8, 1.75),
}  # fmt: skip
TORCH_TARGETS = {"forward": (6, 2.5), "backward": (3, 2.5)}
# Asked of a training step: others' times over ours, by the hidden layers.
TRAINING_TARGETS = {
    (64,): {"torch": 2, "scikit-learn": 1}, (256, 256): {"torch": 1.2}, (512, 512, 512): {"torch": 1},
}  # fmt: skip
SCALER = {"fit": "fit", "partial_fit": "partial_fit, in {} chunks", "transform": "transform"}
CALLED = ["torch", "jax", "NumPy"]  # they allocate their output, and are held against fastbn called; others, fastbn


class Run:
    """The cases of a run: dicts of labels, with "ms" by name."""

    def __init__(self, path: str) -> None:
        run = json.loads(Path(path).read_text())
        self.cases = [b["extra_info"] for b in run["benchmarks"] if "ms" in b["extra_info"]]
        if not self.cases:
            sys.exit(f"{path} has no figures: was it made by make bench?")
        self.cpu = run["machine_info"].get("cpu", {}).get("brand_raw", "unknown processor")

    def has_kernels(self) -> bool:
        return any(c["table"] not in ("training", "scaler") for c in self.cases)

    def of(self, table: str, **labels: object) -> list[dict]:
        """A table's cases that have these labels, by operation."""
        mine = [c for c in self.cases if c["table"] == table and all(c[k] == v for k, v in labels.items())]
        order = [*OPERATIONS, "step", *SCALER]
        return sorted(mine, key=lambda c: order.index(c["operation"]))


def main(path: str) -> None:
    run = Run(path)
    if run.has_kernels():
        write("kernels", lines(run))
        draw(run)
    write("training", training(run))
    write("scaler", scaler(run))


def write(marks: str, found: list[str]) -> None:
    """Between its marks in the document."""
    if not found:
        return
    text = "\n".join(found).rstrip()
    print(text)
    document = DOCS / "performance.md"
    first, last = MARKS[marks]
    before, rest = document.read_text().split(first)
    document.write_text(before + first + "\n" + text + "\n" + last + rest.split(last)[1])


def machine(run: Run, case: dict) -> str:
    return f"{run.cpu}, {case['threads']} threads, backend {case['backend']}, {case['instruction set']}"


def lines(run: Run) -> list[str]:
    found = [
        f"{machine(run, run.cases[0])}. float32 where nothing else is said; milliseconds, the least of a run; in "
        "brackets the time over the floor's.",
        "",
    ]
    for title, section in SECTIONS.items():
        body = section(run)
        if body:
            found += [f"### {title}", "", *body, ""]
    skipped = {name: reason for case in run.cases for name, reason in case.get("skipped", {}).items()}
    return found + [f"Not measured: {name} ({reason})." for name, reason in skipped.items()]


# ---- small things ----


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; nothing where there are no rows."""
    rows = [list(row) for row in rows]
    head = list(header)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] if rows else []


def where(case: dict) -> list[str]:
    """The first three cells of a case's row."""
    return [OPERATIONS[case["operation"]], "×".join(map(str, case["shape"])), case["layout"]]


WHERE = ["operation", "shape", "layout"]


def mean(ratios: Iterable[float]) -> float:
    """Geometric."""
    logs = [log(r) for r in ratios]
    return exp(sum(logs) / len(logs)) if logs else nan


def ratio(case: dict, one: str, other: str) -> float:
    """one's time over other's; NaN where either was not measured."""
    return case["ms"].get(one, nan) / case["ms"].get(other, nan)


def ratios(cases: Iterable[dict], one: str, other: str) -> list[float]:
    return [ratio(c, one, other) for c in cases if one in c["ms"] and other in c["ms"]]


def ours(name: str) -> str:
    """What of ours a peer is held against: like with like."""
    return "fastbn called" if name in CALLED else "fastbn"


def spread(values: Iterable[float], worst: Callable[[Iterable[float]], float], form: str = ".2f") -> str:
    values = list(values)
    return f"{mean(values):{form}} ({'least' if worst is min else 'most'} {worst(values):{form}})" if values else "–"


# ---- the sections ----


def targets(run: Run) -> list[str]:
    """What was asked, and what came of it: geometric means, and the worst case of each."""
    rows = []

    def row(
        what: str, asked: str, values: Iterable[float], worst: Callable[[Iterable[float]], float], passes: str = ""
    ) -> None:
        values = list(values)
        if values:
            rows.append([what, asked, spread(values, worst), passes])

    for (operation, layout), asked in FLOOR_TARGETS.items():
        cases = nine(run, operation, layout)
        if cases:
            floor = total(cases, "floor")
            bare = [bare_passes(c) for c in cases]
            row(
                f"{OPERATIONS[operation]}, {layout}: time / floor",
                f"≤ {asked[0]}",
                ratios(cases, "fastbn", "floor"),
                max,
                written(mean(t / c["ms"]["floor"] for t, c in zip(bare, cases, strict=True))),
            )
            rows.append(
                [
                    f"{OPERATIONS[operation]}, {layout}: ResNet-50's total / floor",
                    f"≤ {asked[1]}",
                    f"{total(cases, 'fastbn') / floor:.2f}",
                    written(sum(layers(c) * t for c, t in zip(cases, bare, strict=True)) / floor),
                ]
            )
    for operation, asked in TORCH_TARGETS.items():
        for layout, least in zip(LAYOUTS, asked, strict=True):
            cases = nine(run, operation, layout)
            for name in ("torch", "torch out"):
                row(
                    f"{OPERATIONS[operation]}, {layout}: {name} / {ours(name)}",
                    f"≥ {least}",
                    ratios(cases, name, ours(name)),
                    min,
                    written(mean(c["ms"].get(name, nan) / bare_passes(c) for c in cases)),
                )
    for operation, title in OPERATIONS.items():
        dense = run.of("operations", operation=operation, layout="NC")
        row(f"{title}, (N, C): torch / fastbn called", "≥ 2", ratios(dense, "torch", "fastbn called"), min)
        row(f"{title}, (N, C): torch out / fastbn", "≥ 2", ratios(dense, "torch out", "fastbn"), min)
    for operation, title in OPERATIONS.items():
        best = []
        for shape in RESNET50:
            layouts = [c for c in run.of("operations", operation=operation, shape=list(shape)) if "oneDNN" in c["ms"]]
            if layouts:
                best.append(min(layouts, key=lambda c: c["ms"]["oneDNN"]))
        row(f"{title}: oneDNN in its better plain layout / fastbn in the same", "≥ 1.3",
            ratios(best, "oneDNN", "fastbn"), min,
            written(mean(c["ms"]["oneDNN"] / bare_passes(c) for c in best)))  # fmt: skip
    for case in run.of("overhead", operation="forward"):
        for name, theirs in (("fastbn", "torch out"), ("fastbn called", "torch")):
            around = (case["ms"][name] - case["ms"]["kernel"]) * 1e3
            rows.append([f"train forward, 32×64: {name} less its kernel, µs", "≤ 3", f"{around:.1f}", ""])
            row(f"train forward, 32×64: {theirs} / {name}", "≥ 3", ratios([case], theirs, name), min)
    for operation, title in OPERATIONS.items():
        cases = run.of("threads", operation=operation)
        row(f"{title}: one thread's closeness to its floor / two threads' to theirs", "≥ 0.9",
            [closeness(c) for c in cases], min)  # fmt: skip
        free = [c for c in cases if ratio(c, "floor of one thread", "floor of two threads") >= 1.6]
        row(f"{title}: one thread / two, where the floor's is 1.6 or more", "≥ 1.6",
            ratios(free, "one thread", "two threads"), min)  # fmt: skip
    for operation, title in OPERATIONS.items():
        cases = run.of("activation", operation=operation)
        for name in ("relu", "leaky_relu"):
            row(f"{title}: fused {name} / plain", "≤ 1.05", ratios(cases, name, "plain"), max)
        for name in WITH_RESIDUAL:
            row(f"{title}: fused {name} / (plain + the residual's bytes)", "≤ 1.05",
                [with_residual(c, name) for c in cases], max,
                written(mean(with_residual(c, name, in_turn(c, name)) for c in cases)))  # fmt: skip
    for name in ("float16", "bfloat16"):
        for operation, title in OPERATIONS.items():
            large = [c for c in run.of("dtypes", operation=operation) if beyond_cache(c)]
            row(f"{title}, beyond the cache: {name} / float32", "≤ 0.7", ratios(large, name, "float32"), max)
    for operation, title in OPERATIONS.items():
        cases = run.of("dtypes", operation=operation)
        row(f"{title}: float64 over its floor / float32 over its own", "1", map(double_to_single, cases), max)
    for operation, title in OPERATIONS.items():
        row(
            f"{title}: Numba / Cython", "≤ 1.5", ratios(run.of("backends", operation=operation), "numba", "cython"), max
        )
    return table(["what", "asked", "measured: geometric mean (worst)", "bare passes in fastbn's place"], rows)


def bare_passes(case: dict) -> float:
    """The time only to read what must be known before anything is written, and then the floor; NaN if not measured."""
    return case["ms"].get("reads", 0 if case["operation"] == "normalize" else nan) + case["ms"]["floor"]


def written(value: float) -> str:
    return "" if isnan(value) else f"{value:.2f}"


def closeness(case: dict) -> float:
    """How near one thread comes to one thread's floor, over how near two come to theirs."""
    return ratio(case, "two threads", "floor of two threads") / ratio(case, "one thread", "floor of one thread")


WITH_RESIDUAL = ("residual", "residual + relu", "residual + leaky_relu")


def in_turn(case: dict, name: str) -> str:
    """The measure that does what this form does in two passes: see cases.in_turn."""
    return "residual in turn" if name == "residual" or case["operation"] != "backward" else "cut residual in turn"


def with_residual(case: dict, name: str, instead: str | None = None) -> float:
    """A form, or what is measured `instead`, over plain and the time to move the residual's own tensors as a copy does.

    Forward reads the residual. Backward writes the residual's gradient and, to see what an activation cut, reads y.
    """
    ms, own = case["ms"], 2 if case["operation"] == "backward" and name != "residual" else 1
    return ms.get(instead or name, nan) / (ms["plain"] + ms["copy"] / 2 * own)


def double_to_single(case: dict) -> float:
    return ratio(case, "float64", "floor of float64") / ratio(case, "float32", "floor of float32")


def beyond_cache(case: dict) -> bool:
    """Whether even the half-precision tensor is larger than the last-level cache."""
    return case["half bytes"] > case["last-level cache"]


def operations(run: Run) -> list[str]:
    """The table of each operation, all libraries."""
    found = []
    for operation, title in OPERATIONS.items():
        cases = run.of("operations", operation=operation)
        names = [name for name in COLORS if any(name in c["ms"] for c in cases)]
        rows = []
        for c in cases:
            cells = [
                f"{c['ms'][name]:.3g} ({ratio(c, name, 'floor'):.2f})" if name in c["ms"] else "–" for name in names
            ]
            rows.append([*where(c)[1:], f"{c['ms']['floor']:.3g}", *cells, f"{c['GB/s']:.0f}"])
        if rows:
            found += [f"**{title}**", "", *table(["shape", "layout", "floor", *names, "GB/s"], rows), ""]
    return found[:-1]


def nine(run: Run, operation: str, layout: str) -> list[dict]:
    """The cases of ResNet-50's shapes."""
    every = run.of("operations", operation=operation, layout=layout)
    return [c for c in every if tuple(c["shape"]) in RESNET50]


def layers(case: dict) -> int:
    """How many layers of ResNet-50 have this shape."""
    return RESNET50[tuple(case["shape"])]


def total(cases: Iterable[dict], name: str) -> float:
    """The time over all of ResNet-50's layers."""
    return sum(layers(c) * c["ms"][name] for c in cases)


def over_resnet50(run: Run) -> list[str]:
    """Means over the nine shapes, and where a peer was faster."""
    rows, faster = [], []
    names = [n for n in COLORS if not n.startswith("fastbn") and any(n in c["ms"] for c in run.of("operations"))]
    for operation, title in OPERATIONS.items():
        for layout in LAYOUTS:
            cases = nine(run, operation, layout)
            if not cases:
                continue
            own = total(cases, "fastbn") / total(cases, "floor")
            row = [title, layout, f"{mean(ratios(cases, 'fastbn', 'floor')):.2f}", f"{own:.2f}"]
            rows.append(row + [spread(ratios(cases, name, ours(name)), min, ".1f") for name in names])
    for case in run.of("operations"):
        for name in names:
            r = ratio(case, name, ours(name))
            if r < 1:
                faster.append(f"{' '.join(where(case))} ({name}: {r:.2f})")
    heads = ["operation", "layout", "time / floor, geometric mean", "total by layers / floor"]
    found = table(heads + [f"{name} / {ours(name)}" for name in names], rows)
    listed = "; ".join(faster) or "nowhere"
    return [*found, "", f"Where a peer was faster, and its time over fastbn's: {listed}."]


def activation(run: Run) -> list[str]:
    """Asked: fused at most 1.05 of plain, plus the residual's own bytes."""
    unfused = [f"{kind}, {peer}" for kind in ("relu", "residual + relu") for peer in ("torch", "NumPy")]
    rows = []
    for c in run.of("activation"):
        row = [*where(c), f"{c['ms']['plain']:.3g}", f"{ratio(c, 'plain', 'floor'):.2f}"]
        row += [f"{ratio(c, name, 'plain'):.2f}" for name in ("relu", "leaky_relu")]
        row += [f"{with_residual(c, name):.2f}" for name in WITH_RESIDUAL]
        rows.append(row + [f"{ratio(c, name, name.split(',')[0]):.1f}" if name in c["ms"] else "–" for name in unfused])
    heads = [*WHERE, "plain", "plain / floor", "relu / plain", "leaky_relu / plain"]
    heads += [f"{name} / (plain + its bytes)" for name in WITH_RESIDUAL]
    return table(heads + [f"unfused {name} / fused" for name in unfused], rows)


def dtypes(run: Run) -> list[str]:
    """Asked: halves at most 0.7 of float32 beyond the last-level cache; float64 over its floor as float32."""
    names = ["float32", "float64", "float16", "bfloat16"]
    rows = [
        [
            *where(c), f"{c['ms']['float32']:.3g}",
            *(f"{ratio(c, name, f'floor of {name}'):.2f}" if name in c["ms"] else "–" for name in names),
            *(f"{ratio(c, name, 'float32'):.2f}" if name in c["ms"] else "–" for name in names[1:]),
            "yes" if beyond_cache(c) else "no",
        ]
        for c in run.of("dtypes")
    ]  # fmt: skip
    heads = [
        *WHERE,
        "float32",
        *(f"{name} / its floor" for name in names),
        *(f"{name} / float32" for name in names[1:]),
    ]
    return table([*heads, "beyond the cache"], rows)


def threads(run: Run) -> list[str]:
    """Asked: one thread at least 0.9 as near to its floor; two 1.6 times as fast as one, where memory lets them."""
    counts = ["one thread", "two threads"]
    rows = [
        [
            *where(c), *(f"{c['ms'][n]:.3g}" for n in counts), *(f"{ratio(c, n, f'floor of {n}'):.2f}" for n in counts),
            f"{closeness(c):.2f}", f"{ratio(c, *counts):.2f}", f"{ratio(c, *(f'floor of {n}' for n in counts)):.2f}",
        ]
        for c in run.of("threads")
    ]  # fmt: skip
    heads = [*WHERE, *counts, *(f"{n} / its floor" for n in counts), "closeness, one / two", "one / two", "floor's"]
    return table(heads, rows)


def overhead(run: Run) -> list[str]:
    """In µs. Asked of forward: at most 3 more than the kernel, at most a third of torch's call."""
    names = ["kernel", "fastbn", "fastbn called", "torch out", "torch"]
    rows = []
    for c in run.of("overhead"):
        cells = [f"{c['ms'][name] * 1e3:.2f}" if name in c["ms"] else "–" for name in names]
        around = (c["ms"]["fastbn"] - c["ms"]["kernel"]) * 1e3
        peers = [f"{ratio(c, name, ours(name)):.2f}" if name in c["ms"] else "–" for name in ("torch out", "torch")]
        rows.append([OPERATIONS[c["operation"]], *cells, f"{around:.2f}", *peers])
    return table(["µs", *names, "fastbn - kernel", "torch out / fastbn", "torch / fastbn called"], rows)


def backends(run: Run) -> list[str]:
    """Asked: at most 1.5 in geometric mean over the nine shapes."""
    rows = []
    for operation, title in OPERATIONS.items():
        for layout in LAYOUTS:
            cases = run.of("backends", operation=operation, layout=layout)
            if cases:
                over = [f"{mean(ratios(cases, name, 'floor')):.2f}" for name in ("cython", "numba")]
                rows.append([title, layout, *over, spread(ratios(cases, "numba", "cython"), max)])
    return table(["operation", "layout", "Cython / floor", "Numba / floor", "Numba / Cython"], rows)


def training(run: Run) -> list[str]:
    """Steps of a network: milliseconds, and others' times over ours."""
    cases = run.of("training")
    if not cases:
        return []
    peers = ["torch", "scikit-learn"]
    times = ["fastbn", "fastbn, teams", *peers]
    shares = {"matmul": "fastbn", "matmul of torch": "torch"}
    rows = []
    for c in cases:
        asked = TRAINING_TARGETS[tuple(c["hidden"])]
        rows.append(
            [c["data"], "-".join(map(str, c["hidden"])), str(c["batch"]), c["optimizer"]]
            + [f"{c['ms'][name]:.3g}" if name in c["ms"] else "–" for name in times]
            + [f"{1e3 / c['ms']['fastbn']:.0f}"]
            + [f"{ratio(c, name, 'fastbn'):.2f} ({asked.get(name, '–')})" for name in peers]
            + [f"{ratio(c, matmul, step):.2f}" for matmul, step in shares.items()]
        )
    heads = ["data", "hidden layers", "batch", "optimizer", *times, "fastbn, steps/s"]
    heads += [f"{name} / fastbn (asked: at least)" for name in peers]
    heads += [f"{matmul} / {step}" for matmul, step in shares.items()]
    return [f"{machine(run, cases[0])}. Milliseconds a step, the least of a run.", "", *table(heads, rows)]


def scaler(run: Run) -> list[str]:
    """Calls of the scaler: milliseconds, and scikit-learn's time over ours."""
    cases = run.of("scaler")
    if not cases:
        return []
    names = ["fastbn", "scikit-learn"]
    rows = [
        [SCALER[c["operation"]].format(c["chunks"]), "×".join(map(str, c["shape"]))]
        + [f"{c['ms'][name]:.3g}" if name in c["ms"] else "–" for name in names]
        + [f"{ratio(c, 'scikit-learn', 'fastbn'):.2f}" if "scikit-learn" in c["ms"] else "–"]
        for c in cases
    ]
    heads = ["call", "rows × features", *names, "scikit-learn / fastbn"]
    return [f"{machine(run, cases[0])}. float32; milliseconds, the least of a run.", "", *table(heads, rows)]


SECTIONS: dict[str, Callable[[Run], list[str]]] = {
    "What was asked": targets,
    "Operations": operations,
    "Over ResNet-50's nine shapes": over_resnet50,
    "Activation and residual": activation,
    "Data types": dtypes,
    "One thread and two": threads,
    "A call on a 32×64 array": overhead,
    "Numba": backends,
}


def draw(run: Run) -> None:
    figure, axes = plt.subplots(len(OPERATIONS), 2, figsize=(17, 11), sharey="row", layout="constrained")
    for row, (operation, title) in zip(axes, OPERATIONS.items(), strict=True):
        for panel, layout in zip(row, LAYOUTS, strict=True):
            cases = run.of("operations", operation=operation, layout=layout)
            names = [n for n in COLORS if n != "NumPy" and any(n in c["ms"] for c in cases)]
            width = 0.84 / max(1, len(names))
            for i, name in enumerate(names):
                places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(cases))]
                panel.bar(places, [ratio(c, name, "floor") for c in cases], width, color=COLORS[name], label=name)
            panel.axhline(1, color="black", linewidth=1)
            panel.set(title=f"{title}, {layout}", yscale="log", yticks=[1, 2, 5, 10, 20, 50])
            panel.yaxis.set_major_formatter("{x:g}×")
            panel.set_xticks(
                range(len(cases)), ["×".join(map(str, c["shape"][1:])) for c in cases], rotation=30, ha="right"
            )
            panel.grid(axis="y", alpha=0.3)
        row[0].set_ylabel("time over floor")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(COLORS))
    figure.suptitle(f"ResNet-50's batch norms at batch 32, float32, over what memory allows (line)\n{run.cpu}")
    (DOCS / "figures").mkdir(exist_ok=True)
    figure.savefig(DOCS / "figures" / "performance.png", dpi=100)


if __name__ == "__main__":
    main(sys.argv[1])
