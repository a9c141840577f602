"""The table of the CUDA kernels' machine code: kept as JSON for the tests and as Markdown to read, and made again."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cuda_code import ARCHITECTURES, UNITS, Code, Kernel, codes_of, fingerprint
from figures import REGISTERS
from figures import Row as TritonRow
from table import FOLDER, document, write_rows
from table import load as load_triton_table

from prefix_fast.backends.triton_config import padded
from prefix_fast.cuda_build import Toolkit

JSON, MARKDOWN = FOLDER / "cuda_table.json", FOLDER / "cuda_table.md"
PREFACE = """
Made by `make bench-static` with {}; nothing here ran on a device. Warps: that fit on a multiprocessor together by
their registers. Loops: instructions / matrix instructions of one tile (of float32: multiply-adds), and in
parentheses the instructions per matrix instruction against the Triton kernel of the same work, of whose matrix
instructions those count that the head dim needs: Triton pads it to a power of two. Where Triton has matrix
instructions of another kind (sm_90, sm_100), against its kernel for sm_80. In *edge* some query may not see some key;
*tile* has both, with softcap, bias and dropout.
"""
LOOPS = {  # of kernels without options and with them
    "forward": (("whole", "edge"), ("tile",)),
    "dq": (("whole", "edge"), ("tile",)),
    "dkv": (("whole", "edge"), ("tile",)),
    "decode": (("many whole", "many edge", "few whole", "few edge"), ("many tile", "few tile")),
    "short": (("own whole", "own edge"), ()),
}
# Triton's kernel, and its loop, that does the work of a loop.
SPLIT = " B64 T1 Tk512 P8192"
TWINS = {
    ("forward", "whole"): ("", "forward", "own"),
    ("dq", "whole"): ("", "dq", "own"),
    ("dkv", "whole"): ("", "dkv prefix", "prefix"),
    ("short", "own whole"): ("", "dq", "own"),
    ("decode", "many whole"): (SPLIT, "split", "prefix"),
    ("decode", "few whole"): (SPLIT, "split", "own keys"),
}
OTHER_INSTRUCTIONS = {90: 80, 100: 80}
PRODUCTS = {"fp16": "bf16", "bf16": "bf16", "fp32": "fp32-ieee", "tf32": "fp32-tf32"}  # as Triton's table has them
LARGEST_RATIO = 1.1
# nvcc 13.0 puts NOPs between the products of sm_120, a tenth of the instructions, which Triton's assembler does not.
LARGEST_RATIO_ON_SM_120 = 1.24
LEAST_WARPS = 8
Key = tuple[int, str, str, int, str]


@dataclass(frozen=True)
class Row:
    """One line of the table. `loops`: (instructions, matrix instructions, ratio to Triton's or None)."""

    architecture: int
    products: str
    kernel: str
    head_dim: int
    variant: str
    registers: int
    stack: int
    spills: int
    spills_in_loops: int
    warps: int
    loops: dict[str, tuple[int, int, float | None]] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def key(self) -> Key:
        """Its line in the table."""
        return self.architecture, self.products, self.kernel, self.head_dim, self.variant


def rows_of(
    toolkit: Toolkit, source: str, products: str, architectures: Sequence[int] = ARCHITECTURES
) -> Iterator[Row]:
    """Compile a source for a type of products."""
    mark = fingerprint(source, products)
    for architecture, codes in codes_of(toolkit, source, products, architectures).items():
        for kernel, code in codes.items():
            blocks = REGISTERS // (-(-code.registers // 8) * 8 * code.threads)
            yield Row(
                architecture, products, kernel.name, kernel.head_dim, _variant(kernel), code.registers, code.stack,
                code.spills, code.spills_in_loops, blocks * code.threads // 32,
                _loops(architecture, products, kernel, code), mark,
            )  # fmt: skip


def _variant(kernel: Kernel) -> str:
    options = ("options",) if kernel.flags[:1] == (True,) else ()
    wanted = tuple(name for name, flag in zip(("keys", "values"), kernel.flags[1:], strict=False) if flag)
    return " ".join((*options, *(wanted if len(wanted) == 1 else ())))


def _loops(architecture: int, products: str, kernel: Kernel, code: Code) -> dict[str, tuple[int, int, float | None]]:
    plain, with_options = LOOPS.get(kernel.name, ((), ()))
    names = with_options if kernel.flags[:1] == (True,) else plain
    if not names:
        return {}
    found = code.loops
    if products == "fp32":
        found = found[: len(names)]  # the merge of parts has multiply-adds too
    if kernel.name == "short":
        found = found[-len(names) :]  # around them is that over readers
    if len(names) != len(found):  # the compiler has split, merged or unrolled some
        names = tuple(f"loop {number}" for number in range(len(found)))
    return {
        name: (*sizes, _ratio(architecture, products, kernel, name, sizes[0] / sizes[1]))
        for name, sizes in zip(names, found, strict=True)
    }


@functools.cache
def _triton_rows() -> dict[tuple[str, str, str], TritonRow]:
    return load_triton_table()[1]


def _ratio(architecture: int, products: str, kernel: Kernel, loop: str, cost: float) -> float | None:
    twin = TWINS.get((kernel.name, loop))
    if twin is None or (kernel.name == "dkv" and not all(kernel.flags[1:])):
        return None
    call, name, of = twin
    if products != "fp32":
        architecture = OTHER_INSTRUCTIONS.get(architecture, architecture)
    row = _triton_rows().get((f"sm_{architecture}", f"D{kernel.head_dim} {PRODUCTS[products]}{call}", name))
    if row is None or of not in row.loops:
        return None
    instructions, matrix, _ = row.loops[of]
    needed = matrix * kernel.head_dim / padded(kernel.head_dim)
    return round(cost / (instructions / needed), 3)


def faults_of(row: Row) -> list[str]:
    """What is wrong with a compiled kernel, in a few words each."""
    faults = []
    if row.spills or row.stack:
        faults.append(f"{row.spills} spills, {row.spills_in_loops} in loops, stack {row.stack}")
    if row.warps < LEAST_WARPS:
        faults.append(f"{row.warps} resident warps < {LEAST_WARPS}")
    if any(name.startswith("loop") for name in row.loops):
        faults.append(f"{len(row.loops)} loops")
    if row.kernel in LOOPS and not row.loops:
        faults.append("no products")
    for name, (_, _, ratio) in row.loops.items():
        if ratio is not None and ratio > (LARGEST_RATIO_ON_SM_120 if row.architecture == 120 else LARGEST_RATIO):
            faults.append(f"{name} {ratio:.3f} × Triton's")
    return faults


def load() -> tuple[str, dict[Key, Row]]:
    """The release of nvcc that the table was made with, and its rows."""
    if not JSON.exists():
        return "", {}
    stored = json.loads(JSON.read_text(encoding="utf-8"))
    rows = [
        Row(**{**row, "loops": {name: tuple(loop) for name, loop in row["loops"].items()}}) for row in stored["rows"]
    ]
    return stored["nvcc"], {row.key: row for row in rows}


def release_of(toolkit: Toolkit) -> str:
    """As "nvcc 13.0, V13.0.88"."""
    return "nvcc " + toolkit.version.split("release ")[1].splitlines()[0]


def regenerate(toolkit: Toolkit) -> Iterator[tuple[str, str, list[Row]]]:
    """Bring the table up to date; yields source, type and rows as they are compiled. Others are kept.

    What is done when it is interrupted is kept too.
    """
    release, old = load()
    marks = {fingerprint(*unit): unit for unit in UNITS}
    rows = {key: row for key, row in old.items() if release == release_of(toolkit) and row.fingerprint in marks}
    kept = {row.fingerprint for row in rows.values()}
    stale = [unit for mark, unit in marks.items() if mark not in kept]
    try:
        with ThreadPoolExecutor(2) as pool:
            for unit, found in zip(stale, pool.map(lambda unit: list(rows_of(toolkit, *unit)), stale), strict=True):
                rows |= {row.key: row for row in found}
                yield *unit, found
    finally:
        ordered = [rows[key] for key in sorted(rows)]
        write_rows(JSON, {"nvcc": release_of(toolkit)}, ordered)
        MARKDOWN.write_text("\n".join(markdown(release_of(toolkit), ordered)) + "\n", encoding="utf-8")


def markdown(release: str, rows: list[Row]) -> list[str]:
    """A section for each architecture."""
    columns = ("products", "kernel", "D", "variant", "registers", "spills", "warps", "loops", "faults")
    sections = {f"sm_{a}": [line_of(row) for row in rows if row.architecture == a] for a in ARCHITECTURES}
    return document("Machine code of the CUDA kernels", PREFACE.format(release), columns, sections)


def line_of(row: Row) -> str:
    """A row of the Markdown table."""
    loops = [
        f"{name} {instructions}/{matrix}" + ("" if ratio is None else f" ({ratio:.2f})")
        for name, (instructions, matrix, ratio) in row.loops.items()
    ]
    cells = (row.products, row.kernel, row.head_dim or "", row.variant, row.registers, row.spills, row.warps,
             ", ".join(loops), "; ".join(faults_of(row)))  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"
