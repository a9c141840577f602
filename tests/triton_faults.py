"""Kernels that are wrong in ways that the interpreter alone hides, and what the machine of `triton_harness` says.

Run as a program with TRITON_INTERPRET=1; prints one line for each fault that was not seen, and their number.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_harness import AccessError, Machine


@triton.jit
def _chain(out):
    """Each program needs the one before."""
    program = tl.program_id(0)
    before = tl.load(out + program - 1, mask=program > 0, other=0.0)
    tl.store(out + program, before + 1)


@triton.jit
def _same_word(out):
    tl.store(out, tl.program_id(0).to(tl.float32))


@triton.jit
def _copy(source, target, count, stride):
    index = tl.arange(0, 16)
    tl.store(target + index, tl.load(source + index * stride), mask=index < count)


@triton.jit
def _copy_all(source, target, count):
    index = tl.arange(0, 16)
    tl.store(target + index, tl.load(source + index, mask=index < count, other=0.0))


def _launch(kernel: Callable, grid: int, *arguments: object, machine: Machine | None = None) -> Machine:
    machine = machine or Machine(order=3)
    with machine.running():
        kernel[(grid,)](*arguments)
    machine.assert_intact()
    return machine


def _order_shows() -> bool:
    """A chain of programs gives other numbers in another order, whether or not the race is reported."""
    results = []
    for order in (None, 3):
        machine = Machine(order)
        out = machine.memory(8, torch.float32, "out").fill_(0)
        try:
            _launch(_chain, 8, out, machine=machine)
        except AccessError:
            results.append(out.clone())
    return len(results) == 2 and not torch.equal(*results)


def _reported(kernel: Callable, grid: int, *sizes: int, rest: tuple[int, ...] = ()) -> Callable[[], bool]:
    """Whether a launch on tensors of those sizes, the last one writable, raises."""

    def see() -> bool:
        machine = Machine(order=3)
        inputs = [machine.input(torch.ones(size), f"input{i}") for i, size in enumerate(sizes[:-1])]
        out = machine.memory(sizes[-1], torch.float32, "out").fill_(0)
        return _raises(lambda: _launch(kernel, grid, *inputs, out, *rest, machine=machine))

    return see


def _raises(run: Callable[[], object]) -> bool:
    try:
        run()
    except Exception as error:
        return "AccessError" in type(error).__name__ + str(error)
    return False


def _write_into_input() -> bool:
    machine = Machine()
    source = machine.input(torch.ones(16), "source")
    return _raises(lambda: _launch(_copy, 1, torch.zeros(16), source, 16, 1, machine=machine))


def _launcher_writes_into_input() -> bool:
    machine = Machine()
    machine.input(torch.ones(16), "source").add_(1)
    return _raises(machine.assert_intact)


def _launcher_writes_beside() -> bool:
    machine = Machine()
    out = machine.uninitialised(torch.ones(16), "out")
    out.as_strided((1,), (1,), out.storage_offset() + 16).fill_(1)
    return _raises(machine.assert_intact)


def _scratch_is_nan(make: Callable[[], Tensor]) -> Callable[[], bool]:
    """What a launcher allocates and no kernel writes shows in the result."""

    def see() -> bool:
        machine = Machine()
        target = machine.memory(16, torch.float32, "out")
        with machine.running():
            _copy[(1,)](make(), target, 16, 1)
        return bool(target.isnan().all())

    return see


def _hole_is_nan() -> bool:
    """A read between the rows of a sliced input shows in the result."""
    machine = Machine()
    source = machine.input(torch.ones(2, 4), "source", "sliced")
    target = machine.memory(16, torch.float32, "out")
    _launch(_copy, 1, source, target, 16, 1, machine=machine)
    return bool(target[:4].eq(1).all()) and bool(target[4:].isnan().all())


def _right_kernel_passes() -> bool:
    machine = Machine(order=3)
    source, out = machine.input(torch.ones(16), "source"), machine.memory(16, torch.float32, "out")
    _launch(_copy, 1, source, out, 16, 1, machine=machine)
    return bool(out.eq(1).all())


FAULTS: dict[str, Callable[[], bool]] = {
    "another order gives the same": _order_shows,
    "a program needs another one's result": _reported(_chain, 8, 8),
    "two programs write one word": _reported(_same_word, 2, 1),
    "a read past the end": _reported(_copy, 1, 15, 16, rest=(16, 1)),
    "a read far past the end": _reported(_copy, 1, 16, 16, rest=(16, 2**20)),
    "a read before the beginning": _reported(_copy, 1, 16, 16, rest=(16, -1)),
    "a write past the end": _reported(_copy_all, 1, 16, 15, rest=(15,)),
    "a write into an input": _write_into_input,
    "a launcher's write into an input": _launcher_writes_into_input,
    "a launcher's write beside a result": _launcher_writes_beside,
    "empty": _scratch_is_nan(lambda: torch.empty(16)),
    "new_empty": _scratch_is_nan(lambda: torch.ones(1).new_empty(16)),
    "empty_like": _scratch_is_nan(lambda: torch.empty_like(torch.ones(16))),
    "a read between the rows of an input": _hole_is_nan,
    "nothing: a right kernel is refused": _right_kernel_passes,
}


def main(arguments: list[str]) -> int:
    """Try every fault; print those that go unseen."""
    unseen = [name for name, see in FAULTS.items() if not see()]
    print(*(f"unseen: {name}" for name in unseen), f"{len(unseen)} unseen of {len(FAULTS)}", sep="\n")
    return len(unseen)
