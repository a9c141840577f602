"""What a call of the `cpu` backend is measured against: this machine's rates, and the cost model's time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from prefix_fast.backends import native, native_cost
from prefix_fast.backends.native_cost import Machine
from prefix_fast.backends.shapes import Shape


@dataclass(frozen=True)
class Limits:
    """Of one case."""

    flop: float  # of the visible pairs: 4·D each forward, 10·D backward
    bytes: float  # that must move: every tensor once
    predicted_seconds: float
    peak: Callable[[], float]  # FLOP a second of multiply-adds in registers, now

    def figures(self, peak: float) -> dict[str, float]:
        """For the rows of a comparison, with the best peak that was measured in it."""
        named = {name: getattr(self, name) for name in ("flop", "bytes", "predicted_seconds")}
        return {**named, "peak": peak}


@lru_cache(maxsize=1)
def machine_rates() -> Machine:
    """The rates of this machine, measured once a run."""
    return native_cost.measure()


@lru_cache(maxsize=2)
def gemm_rate(dtype: torch.dtype, size: int = 1536, rounds: int = 6) -> float:
    """FLOP a second of PyTorch's own product of two square matrices."""
    a, b = torch.randn(2, size, size).to(dtype)
    a @ b
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def limits_of(shape: Shape, dtype: torch.dtype, *, forward: bool, backward: bool, dropout: bool = False) -> Limits:
    """The limits of the passes that are timed."""
    machine, pairs = machine_rates(), shape.pairs * shape.heads * shape.head_dim
    predicted, flop, moved = 0.0, 0.0, 0.0
    tensors = shape.shared_bytes + shape.own_bytes
    if forward:
        predicted += native_cost.forward_seconds(machine, shape, dtype, dropout)
        flop, moved = flop + 4 * pairs, moved + tensors + 2 * shape.query_bytes
    if backward:
        predicted += native_cost.backward_seconds(machine, shape, dtype, dropout)
        flop, moved = flop + 10 * pairs, moved + 2 * tensors + 4 * shape.query_bytes
    loop = native.extension().multiply_add
    if machine.peak(dtype) == machine.pair_multiply_adds:
        loop = native.extension().multiply_pairs
    return Limits(flop, moved, predicted, lambda: max(loop(machine.threads, 10_000) for _ in range(3)))


def rates() -> dict[str, float | str]:
    """The machine's rates, in units of 10⁹ a second, for the report."""
    machine = machine_rates()
    named: dict[str, float | str] = {"level": machine.level, "float32 multiply-adds": machine.multiply_adds}
    named["float32 GEMM"] = gemm_rate(torch.float32)
    if machine.pair_multiply_adds:
        named["bfloat16 multiply-adds"] = machine.pair_multiply_adds
        named["bfloat16 GEMM"] = gemm_rate(torch.bfloat16)
    named["exponentials"] = machine.exponentials
    named |= {f"bytes from {size >> 20} MiB": rate for size, rate in machine.bandwidths if size >= 1 << 20}
    return {name: rate if isinstance(rate, str) else rate / 1e9 for name, rate in named.items()}


def rates_line(named: dict[str, float | str]) -> str:
    """The rates of `rates` in one line."""
    parts = [f"{name} {rate:.3g}" for name, rate in named.items() if not isinstance(rate, str)]
    return f"measured at level {named['level']}, 10⁹ a second: {', '.join(parts)}"
