"""The random calls of triton_cases on a device, between margins of its memory.

As a program, `FIRST LAST`, it checks the calls of these seeds; compute-sanitizer runs it so.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import triton_cases
from torch import Tensor
from triton_cases import Call, random_call
from triton_harness import _CANARIES, MARGIN, Machine, _PoisonedAllocations, failures_of, words

from prefix_fast.backends.triton_config import device_of, tiles_for
from prefix_fast.backends.triton_vetting import Trial, kind_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class DeviceMachine(Machine):
    """The harness's memory, on a device: margins and inputs are compared afterwards, addresses are not watched."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def memory(self, count: int, dtype: torch.dtype, name: str) -> Tensor:
        whole = torch.empty(count + 2 * MARGIN, dtype=dtype, device="cpu")
        words(whole).fill_(_CANARIES[dtype])
        whole = whole.to(self.device)
        self._memories.append((name, whole, None))
        return whole[MARGIN : MARGIN + count]

    @contextmanager
    def running(self) -> Iterator[None]:
        with _PoisonedAllocations(self):
            yield


def longer(call: Call, factor: int) -> Call:
    """The same kind of call with rows and segments several times as long, not of equal remainders."""
    case = call.case
    sizes = {name: getattr(case, name) for name in ("Tq", "Tk", "P")}
    return replace(call, case=replace(case, **{n: s * factor + s % 3 if s > 1 else s for n, s in sizes.items()}))


def with_tiles_of(call: Call, device: str) -> Call:
    """The call, where it names its forward kernel, with the tile that the device's table has for that."""
    if call.path is None or device == "cpu":
        return call
    kind = kind_of(call.case.D, call.case.dtype, call.case.prefix_dtype is not None)
    table = tiles_for(device_of(torch.device(device).index or 0), *kind)
    return replace(call, path=Trial(call.path.kernel, getattr(table, call.path.kernel)))


def check(seed: int, device: str, factor: int) -> None:
    """Compare the call of a seed, which decides its dtype too, with the float64 truth."""
    call = longer(random_call(seed, DTYPES[seed % 3]), factor)
    triton_cases.check(with_tiles_of(call, device), DeviceMachine(device))


def main(arguments: list[str]) -> int:
    """Check the calls of the seeds [first, last) as they are. Returns the number of failures."""
    seeds = range(int(arguments[0]), int(arguments[1]))
    return failures_of((f"seed {seed}", partial(check, seed, "cuda", 1)) for seed in seeds)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
