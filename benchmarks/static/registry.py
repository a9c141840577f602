"""The kernels that are compiled ahead of time, one entry each, and the calls that they are compiled for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from launches import Launch, Shape


@dataclass(frozen=True)
class Entry:
    """One kernel of the table: which launches it is, and its loops of matrix instructions in the order of the code.

    `plain` is the kernel of `plain_flash` that its loops are compared with, each with the one of the same kind.
    """

    name: str
    function: str
    loops: tuple[str, ...] = ()
    plain: str | None = None
    chosen: Callable[[Launch], bool] = lambda launch: True


def _of_prefix(launch: Launch) -> bool:
    return launch.constant("SET") < launch.constant("SETS")


ROW_MAJOR = ("prefix", "prefix tail", "own", "own diagonal")
ENTRIES = (
    Entry("forward", "forward_kernel", ROW_MAJOR, "forward_kernel"),
    Entry("dq", "dq_kernel", ROW_MAJOR, "dq_kernel"),
    Entry("dkv prefix", "dkv_kernel", ("prefix",), "dkv_kernel", _of_prefix),
    Entry("dkv own", "dkv_kernel", ("own diagonal", "own"), "dkv_kernel", lambda launch: not _of_prefix(launch)),
    Entry("prepare", "prepare_kernel"),
    Entry("reduce", "reduce_kernel"),
)
# Of a loop, the loop of the plain kernel that does the same; what has none is listed alone.
PLAIN_LOOPS = {
    "forward_kernel": ("own", "own diagonal"), "dq_kernel": ("own", "own diagonal"),
    "dkv_kernel": ("own diagonal", "own"),
}  # fmt: skip
COUNTERPARTS = {"prefix": "own", "own": "own", "own diagonal": "own diagonal"}
UNMASKED = ("prefix", "own")


def entry_of(launch: Launch) -> Entry:
    """The entry of a launch; a kernel without one raises, so that none is left out of the table."""
    for entry in ENTRIES:
        if entry.function == launch.kernel and entry.chosen(launch):
            return entry
    raise LookupError(f"{launch.kernel} has no entry in benchmarks/static/registry.py; add one")


@dataclass(frozen=True)
class Call:
    """A shape, the precision of its float32 products, and whether its tiles are those of before a self-check."""

    shape: Shape
    precision: str = "highest"
    safe: bool = False

    def __str__(self) -> str:
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        name = kind[self.shape.dtype]
        if self.shape.dtype == torch.float32:
            name += {"highest": "-ieee", "high": "-tf32x3", "medium": "-tf32"}[self.precision]
        if self.shape.prefix_dtype not in (None, self.shape.dtype):
            name += f"+{kind[self.shape.prefix_dtype]} prefix"
        return f"D{self.shape.D} {name}{' safe' if self.safe else ''}"


HEADS = {64: (12, 12), 80: (32, 32), 96: (32, 32), 128: (32, 8), 256: (16, 8)}


def call_of(
    D: int, dtype: torch.dtype = torch.bfloat16, precision: str = "highest", safe: bool = False, **rest: object
) -> Call:
    """A call with the heads of a model that has this head dim."""
    return Call(Shape(*HEADS[D], D, dtype=dtype, **rest), precision, safe)


CALLS = (
    *(call_of(D) for D in HEADS),
    call_of(64, torch.float16),
    call_of(128, torch.float16),
    *(call_of(D, safe=True) for D in (64, 128, 256)),
    *(call_of(D, prefix_dtype=torch.float32) for D in (64, 128)),
    *(call_of(D, torch.float32, precision) for D in (64, 128, 256) for precision in ("highest", "high", "medium")),
)
