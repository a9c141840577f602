"""Compile kernels ahead of time and print what their machine code is like.

python -I benchmarks/static --table [--target gfx942]                                   bring both tables up to date
python -I benchmarks/static --target sm_90 --head-dim 128 --kernel dq [--tile QUERIES KEYS WARPS STAGES]
"""

from __future__ import annotations

import argparse
import time

import cuda_table
import torch
from figures import faults_of, row_of, works_of
from launches import TARGETS
from registry import CONFIGURATIONS, ENTRIES, HEADS, call_of
from table import MARKDOWN, line_of, regenerate

from prefix_fast.backends.triton_config import Tile
from prefix_fast.cuda_build import find_toolkit

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="of all configurations; of CUDA's kernels with nvcc")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--head-dim", type=int, choices=HEADS, action="append")
    parser.add_argument("--kernel", choices=[entry.name for entry in ENTRIES])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="highest")
    parser.add_argument("--tile", type=int, nargs=4, metavar=Tile._fields, help="instead of the table's")
    chosen = parser.parse_args()
    targets = tuple(chosen.target or TARGETS)
    if chosen.table:
        _table(targets)
        if not chosen.target:
            _cuda_table()
        return
    tile = chosen.tile and Tile(*chosen.tile)
    for architecture in targets:
        for D in chosen.head_dim or (64, 128):
            for work in works_of(call_of(D, DTYPES[chosen.dtype], chosen.precision), architecture, chosen.kernel, tile):
                print(f"{architecture:7}", line_of(row_of(work)), flush=True)


def _table(targets: tuple[str, ...]) -> None:
    begin, count, compiled, faulty = time.perf_counter(), 0, 0, 0
    for fresh, row in regenerate(targets):
        count, compiled, faulty = count + 1, compiled + fresh, faulty + bool(faults_of(row))
        if fresh:
            print(f"{time.perf_counter() - begin:5.0f} s  {row.architecture:7}", line_of(row), flush=True)
    print(f"{count} kernels of {len(CONFIGURATIONS)} calls, {compiled} compiled now, {faulty} with faults: {MARKDOWN}")


def _cuda_table() -> None:
    toolkit = find_toolkit()
    if toolkit is None:
        print("no nvcc: the table of the CUDA kernels stays as it is")
        return
    begin = time.perf_counter()
    for source, products, rows in cuda_table.regenerate(toolkit):
        faulty = sum(bool(cuda_table.faults_of(row)) for row in rows)
        print(
            f"{time.perf_counter() - begin:5.0f} s  {source} {products}: {len(rows)} kernels, {faulty} with faults",
            flush=True,
        )
    print(cuda_table.MARKDOWN)


if __name__ == "__main__":
    main()
