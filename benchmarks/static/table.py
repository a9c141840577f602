"""The table of all configurations: kept as JSON for the tests and as Markdown to read, and made again where stale."""

from __future__ import annotations

import json
import multiprocessing
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from figures import Row, faults_of, row_of, works_of
from launches import TARGETS
from registry import CONFIGURATIONS, ENTRIES, Call

FOLDER = Path(__file__).resolve().parent
JSON, MARKDOWN = FOLDER / "table.json", FOLDER / "table.md"
PROCESSES = 2
PREFACE = """
Made by `make bench-static` with Triton {}; nothing here ran on a device. Tile: queries × keys (0: the kernel has no
such block), warps, stages. Occupancy: programs that fit on a multiprocessor together. Loops: instructions / matrix
instructions, and in parentheses the instructions per matrix instruction against plain flash attention
(`plain_flash.py`) compiled for the same tile. In fp32-ieee on NVIDIA, multiply-adds stand for matrix instructions.
"""
Key = tuple[str, str, str]


def load() -> tuple[str, dict[Key, Row]]:
    """The release of Triton that the table was made with, and its rows."""
    if not JSON.exists():
        return "", {}
    stored = json.loads(JSON.read_text(encoding="utf-8"))
    rows = [
        Row(**{**row, "tile": tuple(row["tile"]), "loops": {k: tuple(v) for k, v in row["loops"].items()}})
        for row in stored["rows"]
    ]
    return stored["triton"], {(row.architecture, row.call, row.kernel): row for row in rows}


def fingerprints() -> dict[Key, str]:
    """Of every line that the table is to have, without compiling."""
    return {work.name: work.fingerprint for target, call in CONFIGURATIONS for work in works_of(call, target)}


def _fresh(task: tuple[str, Call, dict[Key, Row]]) -> list[tuple[bool, Row]]:
    architecture, call, kept = task
    rows = []
    for work in works_of(call, architecture):
        old = kept.get(work.name)
        current = old is not None and old.fingerprint == work.fingerprint
        rows.append((not current, old if current else row_of(work)))
    return rows


def regenerate(targets: tuple[str, ...] = TARGETS) -> Iterator[tuple[bool, Row]]:
    """Bring the table up to date; yields (compiled now, row) as it goes. Rows whose kernel is unchanged are kept.

    What is done when it is interrupted is kept too.
    """
    release, old = load()
    calls = {(target, str(call)): place for place, (target, call) in enumerate(CONFIGURATIONS)}
    kernels = {entry.name: place for place, entry in enumerate(ENTRIES)}
    known = {key: row for key, row in old.items() if key[:2] in calls and key[2] in kernels}
    rows = known if release == triton.__version__ else {}
    tasks = [(target, call, rows) for target, call in CONFIGURATIONS if target in targets]
    try:
        with multiprocessing.get_context("fork").Pool(PROCESSES, torch.set_num_threads, (1,)) as pool:
            for found in pool.imap_unordered(_fresh, tasks):
                first = found[0][1]
                for key in [key for key in rows if key[:2] == (first.architecture, first.call)]:
                    del rows[key]
                for compiled, row in found:
                    rows[row.architecture, row.call, row.kernel] = row
                    yield compiled, row
    finally:
        store([rows[key] for key in sorted(rows, key=lambda key: (calls[key[:2]], kernels[key[2]]))])


def store(rows: list[Row]) -> None:
    """Write both files."""
    write_rows(JSON, {"triton": triton.__version__}, rows)
    MARKDOWN.write_text("\n".join(markdown(rows)) + "\n", encoding="utf-8")


def write_rows(path: Path, head: dict[str, str], rows: Sequence[Any]) -> None:
    """Write dataclasses as JSON, a line each."""
    begin = json.dumps(head)[:-1]
    lines = ",\n".join("  " + json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    path.write_text(f'{begin}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def markdown(rows: list[Row]) -> list[str]:
    """A section for each architecture."""
    columns = ("call", "kernel", "tile", "registers", "stack", "spills (in loops)", "shared", "occupancy", "loops",
               "faults")  # fmt: skip
    sections = {target: [line_of(row) for row in rows if row.architecture == target] for target in TARGETS}
    return document("Machine code of the Triton kernels", PREFACE.format(triton.__version__), columns, sections)


def document(title: str, preface: str, columns: Sequence[str], sections: dict[str, list[str]]) -> list[str]:
    """The lines of a file with a table in each section."""
    lines = [f"# {title}", "", *textwrap.wrap(preface.strip(), 120)]
    for name, rows in sections.items():
        lines += ["", f"## {name}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *rows]
    return lines


def line_of(row: Row) -> str:
    """A row of the Markdown table."""
    queries, keys, warps, stages = row.tile
    tile = f"{queries}×{keys} {warps}w {stages}s" if queries * keys else f"{warps}w"
    loops = [
        f"{name} {instructions}/{matrix}" + ("" if ratio is None else f" ({ratio:.2f})")
        for name, (instructions, matrix, ratio) in row.loops.items()
    ]
    cells = (
        row.call, row.kernel, tile, row.registers, row.stack, f"{row.spills} ({row.spills_in_loops})", row.shared,
        row.occupancy, ", ".join(loops), "; ".join(faults_of(row)),
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"
