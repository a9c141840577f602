"""The kernels that are compiled ahead of time, one entry each, and the calls that they are compiled for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from launches import TARGETS, Launch, Shape
from torch import Tensor


def _no_loops(launch: Launch) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Entry:
    """One kernel of the table: which launches it is, and its loops of matrix instructions in the order of the code.

    `plain` is the kernel of `plain_flash` that its loops are compared with, each with the one of the same kind.
    """

    name: str
    function: str
    loops: Callable[[Launch], tuple[str, ...]] = _no_loops
    plain: str | None = None
    chosen: Callable[[Launch], bool] = lambda launch: True

    @property
    def multiplies(self) -> bool:
        """Whether it is made of matrix products."""
        return self.loops is not _no_loops


def _of_prefix(launch: Launch) -> bool:
    return launch.constant("SET") < launch.constant("SETS")


def _row_major(launch: Launch) -> tuple[str, ...]:
    window = ("own window",) if launch.constant("WINDOW") else ()
    middle = "own masked" if launch.has("key_mask") else "own"
    return ("prefix", "prefix tail", *window, middle, "own diagonal")


def _short(launch: Launch) -> tuple[str, ...]:
    return _row_major(launch)[2:]  # the segment is one block, in no loop of its own


def _split(launch: Launch) -> tuple[str, ...]:
    return ("prefix", "prefix tail", "own keys", "own edge")  # own tokens have tiles of another size


ENTRIES = (
    Entry("forward", "forward_kernel", _row_major, "forward_kernel"),
    Entry("split", "split_forward_kernel", _split, "forward_kernel"),
    Entry("merge", "merge_kernel"),
    Entry("dq", "dq_kernel", _row_major, "dq_kernel"),
    Entry("dkv prefix", "dkv_kernel", lambda launch: ("prefix tail", "prefix"), "dkv_kernel", _of_prefix),
    Entry(
        "dkv own",
        "dkv_kernel",
        lambda launch: ("own diagonal", "own"),
        "dkv_kernel",
        lambda launch: not _of_prefix(launch),
    ),
    Entry("short", "short_kernel", _short, "dq_kernel"),
    Entry("prepare", "prepare_kernel"),
    Entry("reduce", "reduce_kernel"),
)
# Of a loop, the loop of the plain kernel that does the same; what has none is listed alone.
PLAIN_LOOPS = {
    "forward_kernel": ("own", "own diagonal"), "dq_kernel": ("own", "own diagonal"),
    "dkv_kernel": ("own diagonal", "own"),
}  # fmt: skip
COUNTERPARTS = {"prefix": "own", "own": "own", "own diagonal": "own diagonal"}
UNMASKED = {"prefix": "prefix tail", "own": "own diagonal"}  # and the loop that does the same with a mask


def entry_named(name: str) -> Entry:
    """The entry of that name; raises StopIteration where there is none."""
    return next(entry for entry in ENTRIES if entry.name == name)


def entry_of(launch: Launch) -> Entry:
    """The entry of a launch; a kernel without one raises, so that none is left out of the table."""
    for entry in ENTRIES:
        if entry.function == launch.kernel and entry.chosen(launch):
            return entry
    raise LookupError(f"{launch.kernel} has no entry in benchmarks/static/registry.py; add one")


@dataclass(frozen=True)
class Call:
    """A shape, the precision of float32 products, an option, and whether the tiles are those before a self-check."""

    shape: Shape
    precision: str = "highest"
    safe: bool = False
    option: str = ""
    kernels: tuple[str, ...] = ()  # entries that the table lists; none: all

    def __str__(self) -> str:
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        name = kind[self.shape.dtype]
        if self.shape.dtype == torch.float32:
            name += {"highest": "-ieee", "high": "-tf32x3", "medium": "-tf32"}[self.precision]
        if self.shape.prefix_dtype not in (None, self.shape.dtype):
            name += f"+{kind[self.shape.prefix_dtype]} prefix"
        for size in ("B", "N", "T", "Tk", "P"):
            if getattr(self.shape, size) != getattr(Shape(1, 1, 1), size):
                name += f" {size}{getattr(self.shape, size)}"
        return f"D{self.shape.D} {name}{' safe' if self.safe else ''}{f' {self.option}' if self.option else ''}"

    @property
    def without_matrix_cores(self) -> bool:
        """NVIDIA's tensor cores have no float32 products."""
        return self.shape.dtype == torch.float32 and self.precision == "highest"

    @property
    def compared(self) -> bool:
        """Whether the loops are compared with plain ones: not where options or conversions take their toll."""
        mixed = self.shape.prefix_dtype not in (None, self.shape.dtype)
        return not (self.without_matrix_cores or self.safe or self.option or mixed)

    @property
    def options(self) -> dict[str, Any]:
        """What of the problem the option sets."""
        return OPTIONS[self.option](self.shape) if self.option else {}


def _empty(dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


# Masks, exponents and random numbers take instructions and registers that no plain kernel has: listed, not judged.
OPTIONS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "key_mask": lambda shape: {"key_mask": _empty(torch.bool, shape.B, shape.T)},
    "window": lambda shape: {"window": shape.T // 2},
    "softcap": lambda shape: {"softcap": 30.0},
    "bias": lambda shape: {"attn_bias": _empty(shape.dtype, 1, shape.H, shape.T, shape.T)},
    "dropout": lambda shape: {"dropout_p": 0.1, "dropout_seed": _empty(torch.int64, 1)},
}
HEADS = {64: (12, 12), 80: (32, 32), 96: (32, 32), 128: (32, 8), 256: (16, 8)}


def call_of(
    D: int, dtype: torch.dtype = torch.bfloat16, precision: str = "highest", safe: bool = False, option: str = "",
    kernels: tuple[str, ...] = (), **sizes: Any,
) -> Call:  # fmt: skip
    """A call with the heads of a model that has this head dim."""
    return Call(Shape(*HEADS[D], D, dtype=dtype, **sizes), precision, safe, option, kernels)


def decode_of(D: int, B: int = 64, T: int = 1, **rest: Any) -> Call:
    """A call of few queries against a long prefix, which the forward pass splits."""
    return call_of(D, B=B, T=T, Tk=512, P=8192, kernels=("split", "merge"), **rest)


CALLS = (
    *(call_of(D) for D in HEADS),
    call_of(64, torch.float16),
    *(call_of(D, safe=True) for D in (64, 256)),
    *(call_of(D, prefix_dtype=torch.float32) for D in (64, 128)),
    *(call_of(D, torch.float32, precision) for D in (64, 128) for precision in ("highest", "high", "medium")),
    call_of(256, torch.float32),
    *(decode_of(D) for D in (64, 128, 256)),
    *(decode_of(D, 8, T) for D, T in ((64, 1), (128, 8))),
    decode_of(128, safe=True),
    decode_of(128, prefix_dtype=torch.float32),
    decode_of(128, dtype=torch.float32),
    *(call_of(D, B=4, T=1, Tk=64, P=16, kernels=("forward",)) for D in (64, 128, 256)),
)
SPECIAL_CALLS = (*(call_of(D, N=8) for D in (64, 128)), *(call_of(64, option=option) for option in OPTIONS))
SHORT_CALLS = tuple(call_of(64, B=32, P=P, kernels=("short",)) for P in (10, 32))


def _differs(call: Call, architecture: str) -> bool:
    """AMD has one precision of float32 products."""
    return architecture.startswith("sm_") or call.precision == "highest"


CONFIGURATIONS = (
    *((architecture, call) for call in CALLS for architecture in TARGETS if _differs(call, architecture)),
    *(("sm_90", call) for call in SPECIAL_CALLS),
    *((architecture, call) for call in SHORT_CALLS for architecture in ("sm_90", "sm_100", "gfx942")),
)  # fmt: skip


def call_named(name: str) -> Call:
    """The call of that name; raises StopIteration where there is none."""
    return next(call for call in (*CALLS, *SPECIAL_CALLS, *SHORT_CALLS) if str(call) == name)
