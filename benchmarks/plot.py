"""Pictures of a run: its ratios, and a roofline of the `cpu` backend.

From the run itself (`--plot`), or from its JSON: `plot.py RESULTS.json RATIOS.png ROOFLINE.png`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def draw_roofline(rows: Sequence[Row], rates: dict[str, Any], machine: str, path: Path) -> None:
    """Rate over arithmetic intensity, ours and the rivals', under the roofs that were measured."""
    limited = [row for row in rows if row.flop is not None and row.bytes is not None]
    intensities = [row.flop / row.bytes for row in limited]
    span = [min(intensities, default=1.0) / 2, max(intensities, default=100.0) * 2]
    figure, axes = pyplot.subplots(figsize=(9.0, 5.4), dpi=120, layout="constrained")
    memory = rates[max((name for name in rates if name.startswith("bytes from")), key=_size)]
    axes.plot(span, [memory * x for x in span], color="#333333", linewidth=1.0)
    axes.annotate("memory", (span[0], memory * span[0]), xytext=(4, 6), textcoords="offset points", fontsize=7)
    for name, style in (("multiply-adds", "-"), ("GEMM", ":")):
        for dtype in ("float32", "bfloat16"):
            roof = rates.get(f"{dtype} {name}")
            if roof is not None:
                axes.axhline(roof, color="#333333", linewidth=1.0, linestyle=style)
                label = f"{dtype} {name}, {roof:.0f} GFLOP/s"
                axes.annotate(
                    label, (span[1], roof), xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=7
                )
    marks = [("the rivals", "#9498a0", "x", [row for row in limited if row.error is not None], False)]
    for group, color in COLORS.items():
        for dtype, marker in (("float32", "o"), ("bfloat16", "s")):
            shown = [row for row in limited if row.group == group and ("bfloat16" in row.case) == (dtype == "bfloat16")]
            marks.append((f"prefix_attention, {group}, {dtype}", color, marker, shown, True))
    for label, color, marker, shown, ours in marks:
        if shown:
            seconds = [row.ours_seconds if ours else row.rival_seconds for row in shown]
            rate = [row.flop / time / 1e9 for row, time in zip(shown, seconds, strict=True)]
            axes.scatter([row.flop / row.bytes for row in shown], rate, s=22, color=color, marker=marker, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*span)
    axes.set_xlabel("FLOP of visible pairs for each byte of the tensors", fontsize=8)
    axes.set_ylabel("GFLOP/s", fontsize=8)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.legend(fontsize=7, loc="lower right")
    axes.set_title("Useful work against the machine's measured limits, one run", fontsize=10.5, loc="left")
    figure.supxlabel(machine, fontsize=6.5, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def _size(name: str) -> int:
    """Of "bytes from 128 MiB"."""
    return int(name.split()[2])


def main(results: str, ratios: str, roofline: str) -> None:
    """Draw the rows that a run has left in pytest-benchmark's JSON."""
    data = json.loads(Path(results).read_text("utf-8"))
    rows = [
        Row.from_dict(fields) for benchmark in data["benchmarks"] for fields in benchmark["extra_info"].get("rows", [])
    ]
    facts = data["machine_info"]["prefix_fast"]
    draw([row for row in rows if row.headline], machine_line(facts), Path(ratios))
    draw_roofline(rows, facts["rates"], machine_line(facts), Path(roofline))


if __name__ == "__main__":
    main(*sys.argv[1:])
