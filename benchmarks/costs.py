"""Fits the costs of the CPU model to measured times: `python -I benchmarks/costs.py --write`.

It measures every arithmetic of this machine, or those named as arguments, shows the error of each case, and prints the
lines of the table in prefix_fast/backends/native_cost.py; `--write` puts them there.

Times are those of one thread's own processor time, which a busy machine delays but does not change much: the least of
several visits. A cost is never negative; the fit minimises the sum of the relative errors, so that a few times that a
neighbour has spoilt do not count.
"""

import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_fast import prefix_attention
from prefix_fast.backends import native, native_cost
from prefix_fast.backends.native_cost import Machine, Work
from prefix_fast.backends.shapes import Shape
from prefix_fast.prediction import label

GPT2, GROUPED, LLAMA = (12, 12, 64), (12, 4, 64), (32, 8, 128)  # H, Hkv, D


def shape_of(B: int, Tq: int, Tk: int, P: int, heads: tuple[int, int, int] = GPT2) -> Shape:
    """One shared prefix."""
    H, Hkv, D = heads
    return Shape(B, H, Hkv, Tq, Tk, D, 4, ((1, P),))


TRAINING = [
    *(shape_of(8, 128, 128, P) for P in (10, 200, 1024)),
    *(shape_of(B, 512, 512, P) for B, P in ((2, 200), (1, 1024))),
    *(shape_of(2, 128, 128, P, (12, 12, D)) for D in (80, 96, 128, 256) for P in (10, 200)),
    shape_of(1, 128, 128, 200), shape_of(1, 16, 16, 10),
    shape_of(8, 33, 33, 50), shape_of(8, 16, 16, 200), shape_of(32, 64, 64, 20),
    shape_of(8, 128, 128, 200, GROUPED), shape_of(2, 128, 128, 200, LLAMA),
]  # fmt: skip
DECODING = [
    *(shape_of(64, 1, 64, P) for P in (10, 200, 1024)),
    *(shape_of(16, 1, Tk, 1024) for Tk in (64, 512)),
    *(shape_of(1, 1, Tk, 1024) for Tk in (1, 64, 512)), shape_of(1, 1, 16, 10), shape_of(4, 1, 16, 50),
    shape_of(32, 1, 64, 4096), shape_of(32, 1, 64, 1024, LLAMA), shape_of(4, 1, 64, 1024, LLAMA),
]  # fmt: skip
DROPOUT = [shape_of(8, 128, 128, 10), shape_of(2, 128, 128, 200), shape_of(4, 1, 64, 1024)]


class Case(NamedTuple):
    """One call to time."""

    shape: Shape
    dtype: torch.dtype
    backward: bool
    dropout: bool = False

    def __str__(self) -> str:
        kind = "backward" if self.backward else "forward"
        return f"{kind} {label(self.shape)} {str(self.dtype)[6:]}{' dropout' if self.dropout else ''}"

    def limits(self, machine: Machine) -> Work:
        """What the model counts, in seconds at the machine's rates."""
        count = native_cost.backward_limits if self.backward else native_cost.forward_limits
        return count(machine, self.shape, self.dtype, self.dropout)

    def predicted(self, machine: Machine) -> float:
        """Seconds."""
        return self.limits(machine).times(native_cost.COSTS[machine.arithmetic(self.dtype)]).total


def cases(dtype: torch.dtype) -> list[Case]:
    """Forward and backward of training, forward of decoding, some of both with dropout."""
    both = [Case(shape, dtype, backward) for shape in TRAINING for backward in (False, True)]
    dropout = [Case(shape, dtype, backward, True) for shape in DROPOUT[:2] for backward in (False, True)]
    return [*both, *(Case(shape, dtype, False) for shape in DECODING), *dropout, Case(DROPOUT[2], dtype, False, True)]


def run_of(case: Case) -> Callable[[], object]:
    """The call, on random tensors."""
    shape, generator = case.shape, torch.Generator().manual_seed(0)
    (_, prefix), B, H, Hkv, D = shape.sets[0], shape.rows, shape.heads, shape.kv_heads, shape.head_dim
    sizes = [(B, H, shape.queries), (B, Hkv, shape.keys), (B, Hkv, shape.keys), (1, Hkv, prefix), (1, Hkv, prefix)]
    leaves = [torch.randn(*size, D, generator=generator).to(case.dtype).requires_grad_(case.backward) for size in sizes]

    def forward() -> Tensor:
        return prefix_attention(*leaves, dropout_p=0.1 if case.dropout else 0.0, backend="cpu")

    if not case.backward:
        return forward
    out, grad_out = forward(), torch.randn(B, H, shape.queries, D, generator=generator).to(case.dtype)
    return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)


def least_seconds(run: Callable[[], object], budget: float) -> float:
    """Processor time of one thread's fastest call, of at least three and as many as fit the budget in seconds."""
    times, end = [], time.perf_counter() + budget
    run()
    while len(times) < 3 or time.perf_counter() < end:
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times)


def fit(limits: Sequence[Work], seconds: Sequence[float]) -> Work:
    """The costs, none of them negative, whose predictions have the least sum of relative errors."""
    parts = torch.tensor(limits, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    kinds = [kind for kind in range(parts.shape[1]) if parts[:, kind].any()]
    weights = torch.ones(len(parts), dtype=torch.float64)
    for _ in range(50):  # least squares, weighted anew by 1 / |error|
        costs = torch.linalg.lstsq(weights[:, None] * parts[:, kinds], weights[:, None]).solution[:, 0]
        if bool((costs < 0).any()):
            del kinds[int(costs.argmin())]
            continue
        weights = (parts[:, kinds] @ costs - 1).abs().clamp(min=0.02).rsqrt()
    fitted = dict(zip(kinds, costs.tolist(), strict=True))
    return Work(*(fitted.get(kind, 0.0) for kind in range(len(Work._fields))))


def table_line(arithmetic: str, costs: Work) -> str:
    """An entry of native_cost.COSTS."""
    return f'    "{arithmetic}": Work({", ".join(f"{cost:.3g}" for cost in costs)}),'


def measured(known: Sequence[Case], visits: int) -> list[float]:
    """Seconds of every case, all visited in turn."""
    seconds = [math.inf] * len(known)
    for _ in range(visits):
        for number, case in enumerate(known):
            seconds[number] = min(seconds[number], least_seconds(run_of(case), 0.2))
    return seconds


def write_table(lines: dict[str, str], path: Path) -> None:
    """Replace these arithmetics' lines of the table in that file."""
    text = path.read_text("utf-8")
    for arithmetic, line in lines.items():
        text, count = re.subn(rf'^    "{re.escape(arithmetic)}": Work\(.*\),$', line, text, flags=re.MULTILINE)
        assert count == 1, f"{path} has {count} lines of {arithmetic}"
    path.write_text(text, "utf-8")


def main(arguments: Sequence[str]) -> None:
    """Measure and fit; print the errors and the lines."""
    torch.set_num_threads(1)
    only = [argument for argument in arguments if argument != "--write"]
    lines: dict[str, str] = {}
    for level in native.available_isas():
        os.environ["PREFIX_FAST_CPU_ISA"] = level
        machine = native_cost.measure()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            arithmetic = machine.arithmetic(dtype)
            if arithmetic in lines or (only and arithmetic not in only):
                continue
            known = cases(dtype)
            seconds = measured(known, 3)
            limits = [case.limits(machine) for case in known]
            costs = fit(limits, seconds)
            for case, part, least in zip(known, limits, seconds, strict=True):
                print(f"{arithmetic}: {case}: {1e3 * least:.3f} ms, {part.times(costs).total / least - 1:+.0%}")
            lines[arithmetic] = table_line(arithmetic, costs)
    print("\n".join(lines.values()))
    if "--write" in arguments:
        write_table(lines, Path(native_cost.__file__))


if __name__ == "__main__":
    main(sys.argv[1:])
