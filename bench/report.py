"""A benchmark run as a table and a picture: python bench/report.py RUN.json

Writes docs/figures/performance.png (time over floor, a bar for each library, a panel for each operation and layout) and
the table between the marks in docs/performance.md.
"""

import json
import sys
from math import exp, log
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from shapes import RESNET50

DOCS = Path(__file__).parent.parent / "docs"
MARKS = "<!-- table: bench/report.py -->", "<!-- end of table -->"
OPERATIONS = {"forward": "train forward", "normalize": "eval", "backward": "backward"}
COLORS = {"fastbn": "#c4451c", "torch": "#4a6fa5", "torch out": "#8fa8cc", "oneDNN": "#5b8c5a", "NumPy": "#999999"}


def main(path: str) -> None:
    run = json.loads(Path(path).read_text())
    cases = [b["extra_info"] for b in run["benchmarks"] if "ms" in b["extra_info"]]
    if not cases:
        sys.exit(f"{path} has no figures: was it made by make bench?")
    for case in cases:
        ms = case["ms"]
        case["floor"] = min(t for name, t in ms.items() if name.startswith("floor"))
        case["over"] = {name: t / case["floor"] for name, t in ms.items() if not name.startswith("floor")}
    cpu = run["machine_info"].get("cpu", {}).get("brand_raw", "unknown processor")
    table = render(cases, cpu)
    print(table)
    document = DOCS / "performance.md"
    text = document.read_text()
    before, rest = text.split(MARKS[0])
    document.write_text(before + MARKS[0] + "\n" + table + "\n" + MARKS[1] + rest.split(MARKS[1])[1])
    draw(cases, cpu)


def mean_ratio(ratios: list[float]) -> float:
    """Geometric mean."""
    return exp(sum(map(log, ratios)) / len(ratios))


def render(cases: list[dict], cpu: str) -> str:
    first = cases[0]
    lines = [
        f"{cpu}, {first['threads']} threads, backend {first['backend']}, {first['instruction set']}. float32, "
        "milliseconds, the least of a run; in brackets the time over the floor's.",
        "",
    ]
    names = list(dict.fromkeys(name for case in cases for name in case["over"]))
    for operation, title in OPERATIONS.items():
        mine = [case for case in cases if case["operation"] == operation]
        if not mine:
            continue
        lines += [f"### {title}", "", "| shape | layout | floor | " + " | ".join(names) + " | GB/s |"]
        lines += ["|---|---|---|" + "---|" * (len(names) + 1)]
        for case in mine:
            cells = [
                f"{case['ms'][name]:.3g} ({case['over'][name]:.2f})" if name in case["over"] else "–" for name in names
            ]
            shape = "×".join(map(str, case["shape"]))
            lines.append(
                f"| {shape} | {case['layout']} | {case['floor']:.3g} | "
                + " | ".join(cells)
                + f" | {case['GB/s']:.0f} |"
            )
        lines.append("")
    lines += ["### Over ResNet-50's nine shapes", ""]
    lines += ["| operation | layout | time / floor, geometric mean | total by layers / floor | "]
    lines[-1] += " | ".join(f"{name} / fastbn" for name in names if name != "fastbn") + " |"
    lines += ["|---|---|---|---|" + "---|" * (len(names) - 1)]
    for operation, title in OPERATIONS.items():
        for layout in ("NCHW", "NHWC"):
            mine = [c for c in cases if c["operation"] == operation and c["layout"] == layout]
            if not mine:
                continue
            layers = [RESNET50[tuple(c["shape"])] for c in mine]
            total = sum(n * c["ms"]["fastbn"] for n, c in zip(layers, mine, strict=True))
            floor = sum(n * c["floor"] for n, c in zip(layers, mine, strict=True))
            geometric = mean_ratio([c["over"]["fastbn"] for c in mine])
            row = f"| {title} | {layout} | {geometric:.2f} | {total / floor:.2f} |"
            for name in names:
                if name == "fastbn":
                    continue
                ratios = [c["ms"][name] / c["ms"]["fastbn"] for c in mine if name in c["ms"]]
                row += f" {mean_ratio(ratios):.1f} (least {min(ratios):.1f}) |" if ratios else " – |"
            lines.append(row)
    slower = [
        f"{OPERATIONS[c['operation']]} {'×'.join(map(str, c['shape']))} {c['layout']} "
        f"({name}: {t / c['ms']['fastbn']:.2f})"
        for c in cases
        for name, t in c["ms"].items()
        if not name.startswith("floor") and t < c["ms"]["fastbn"]
    ]
    lines += ["", "Where a peer was faster, and its time over fastbn's: " + ("; ".join(slower) or "nowhere") + "."]
    skipped = {name: reason for case in cases for name, reason in case["skipped"].items()}
    lines += ["", *(f"Not measured: {name} ({reason})." for name, reason in skipped.items())]
    return "\n".join(lines).rstrip()


def draw(cases: list[dict], cpu: str) -> None:
    figure, axes = plt.subplots(len(OPERATIONS), 2, figsize=(13, 10), sharey="row", layout="constrained")
    for row, (operation, title) in zip(axes, OPERATIONS.items(), strict=True):
        for panel, layout in zip(row, ("NCHW", "NHWC"), strict=True):
            mine = [c for c in cases if c["operation"] == operation and c["layout"] == layout]
            names = [n for n in COLORS if n != "NumPy" and any(n in c["over"] for c in mine)]
            width = 0.8 / max(1, len(names))
            for i, name in enumerate(names):
                places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(mine))]
                heights = [c["over"].get(name, float("nan")) for c in mine]
                panel.bar(places, heights, width, color=COLORS[name], label=name)
            panel.axhline(1, color="black", linewidth=1)
            panel.set(title=f"{title}, {layout}", yscale="log", yticks=[1, 2, 5, 10, 20, 50])
            panel.yaxis.set_major_formatter("{x:g}×")
            labels = ["×".join(map(str, c["shape"][1:])) for c in mine]
            panel.set_xticks(range(len(mine)), labels, rotation=30, ha="right")
            panel.grid(axis="y", alpha=0.3)
        row[0].set_ylabel("time over floor")
    axes[0][0].legend(ncols=2)
    figure.suptitle(f"ResNet-50's batch norms at batch 32, float32, over what memory allows (line)\n{cpu}")
    (DOCS / "figures").mkdir(exist_ok=True)
    figure.savefig(DOCS / "figures" / "performance.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
