"""The picture of measured ratios; from a run (`--plot`), or from its JSON: `plot.py RESULTS.json PICTURE.png`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from compare import Row, machine_line

matplotlib.use("Agg")

from matplotlib import pyplot

COLORS = {"operator": "#4269d0", "decode step": "#6cc5b0", "training step": "#efb118", "generation": "#ff725c"}


def draw(rows: Sequence[Row], machine: str, path: Path) -> None:
    """One bar a row, from 1 to the rival's time over ours, on a logarithmic axis."""
    figure, axes = pyplot.subplots(figsize=(9.0, 1.3 + 0.42 * len(rows)), dpi=120, layout="constrained")
    places = range(len(rows))
    ratios = [row.ratio for row in rows]
    colors = [COLORS.get(row.group, "#9498a0") for row in rows]
    axes.barh(places, [ratio - 1.0 for ratio in ratios], left=1.0, color=colors, height=0.66)
    axes.set_yticks(places, [f"{row.group}: {row.case}\nagainst {row.rival}" for row in rows], fontsize=7.5)
    for place, ratio in zip(places, ratios, strict=True):
        axes.annotate(
            f"{ratio:.1f}×" if ratio >= 1.95 else f"{ratio:.2f}×",
            (max(ratio, 1.0), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold",
        )
    axes.axvline(1.0, color="#333333", linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.75, *(0.9 * ratio for ratio in ratios)), max(2.0, *ratios) * 1.4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.tick_params(axis="both", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_title("The rival's time over prefix_fast's, same results, one run", fontsize=10.5, loc="left")
    figure.supxlabel(machine, fontsize=6.5, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def main(results: str, picture: str) -> None:
    """Draw the rows that a run has left in pytest-benchmark's JSON."""
    data = json.loads(Path(results).read_text("utf-8"))
    rows = []
    for benchmark in data["benchmarks"]:
        for fields in benchmark["extra_info"].get("rows", []):
            row = Row(**{name: value for name, value in fields.items() if name != "ratio"})
            rows += [row] if row.headline else []
    draw(rows, machine_line(data["machine_info"]["prefix_fast"]), Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
