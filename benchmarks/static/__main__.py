"""Compile kernels ahead of time and print what their machine code is like.

python -I benchmarks/static --target sm_90 --head-dim 128 --kernel forward [--tile QUERIES KEYS WARPS STAGES]
"""

from __future__ import annotations

import argparse

import torch
from figures import figures
from launches import TARGETS
from registry import ENTRIES, HEADS, call_of

from prefix_fast.backends.triton_config import Tile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/static", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--head-dim", type=int, choices=HEADS, action="append")
    parser.add_argument("--kernel", choices=[entry.name for entry in ENTRIES])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="highest")
    parser.add_argument("--tile", type=int, nargs=4, metavar=Tile._fields, help="instead of the table's")
    chosen = parser.parse_args()
    for architecture in chosen.target or TARGETS:
        for D in chosen.head_dim or (64, 128):
            call = call_of(D, DTYPES[chosen.dtype], chosen.precision)
            for row in figures(call, architecture, chosen.kernel, chosen.tile and Tile(*chosen.tile)):
                code = row.code
                loops = ", ".join(f"{name} {cost:.2f}" for name, cost in row.loops.items())
                print(
                    f"{row.architecture:7} {row.call:10} {row.kernel:10} {row.tile:14} {code.registers:3} regs, "
                    f"stack {code.stack}, spills {code.spills} ({code.spills_in_loops} in loops), shared {row.shared}, "
                    f"{row.occupancy} together; {loops}{'  FAULTS: ' + '; '.join(row.faults) if row.faults else ''}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
