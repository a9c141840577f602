"""Triton's interpreter as a machine that checks: programs in random order, fenced memory, every access inside a tensor.

The interpreter runs the programs of a grid one after the other and reads and writes real memory, so by itself it hides
what a card shows: programs that depend on each other, reads of what nobody wrote, accesses beside a tensor. `Machine`
shows them:

- programs run in a seeded random order, and a word that one program writes and another reads or writes is an error;
- every address that a program reads or writes lies in a tensor that its launch was given;
- tensors lie between margins of NaN; what is uninitialised, scratch of the launchers included, holds NaN;
- margins, and the whole memory of inputs, have the same bits afterwards.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime import interpreter

MARGIN = 64
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CANARIES = {
    torch.float16: 0x7E5A, torch.bfloat16: 0x7FDA, torch.float32: 0x7FC5A5A5, torch.float64: 0x7FF85A5A5A5A5A5A,
    torch.bool: 1, torch.uint8: 0x5A, torch.int8: 0x5A, torch.int16: 0x5A5A, torch.int32: 0x5A5A5A5A,
    torch.int64: 0x5A5A5A5A5A5A5A5A,
}  # fmt: skip  # NaN for floats, far out of range for integers
_UNINITIALISED = {
    torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided,
}  # fmt: skip


def words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers: NaN equals itself there."""
    return tensor.view(_WORDS[tensor.element_size()])


class AccessError(AssertionError):
    """A program reached memory that it must not, or that another program writes."""


class Machine:
    """One run of a backend: its memory, and the order of its programs (None: the interpreter's own)."""

    device = "cpu"  # type of its memory's

    def __init__(self, order: int | None = None) -> None:
        self.choose = None if order is None else random.Random(order)
        self.launches: list[str] = []
        self._memories: list[tuple[str, Tensor, Tensor | None]] = []  # name, all of it, and its bits where read-only
        self._read_only: set[int] = set()

    def memory(self, count: int, dtype: torch.dtype, name: str) -> Tensor:
        """`count` uninitialised elements between margins."""
        whole = torch.empty(count + 2 * MARGIN, dtype=dtype)
        words(whole).fill_(_CANARIES[dtype])
        self._memories.append((name, whole, None))
        return whole[MARGIN : MARGIN + count]

    def uninitialised(self, like: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A dense tensor of that shape and order of dimensions, full of NaN."""
        dense = torch.empty_like(like, dtype=dtype)
        return self.memory(dense.numel(), dense.dtype, name).as_strided(dense.shape, dense.stride())

    def input(self, tensor: Tensor, name: str, layout: str = "dense") -> Tensor:
        """A copy that nobody may write. `layout`: "dense" as it is, "permuted", or "sliced" out of a wider tensor.

        Dimensions of stride 0 stay so.
        """
        from random_calls import laid_out  # not before a mutant's package is in its place: it imports ours

        copy = laid_out(tensor, layout, lambda count: self.memory(count, tensor.dtype, name))
        _, whole, _ = self._memories[-1]
        self._memories[-1] = (name, whole, words(whole).clone())
        self._read_only.add(whole.untyped_storage().data_ptr())
        return copy

    def assert_intact(self) -> None:
        """Raise where a margin, or any of an input, was written."""
        for name, whole, bits in self._memories:
            now = words(whole)
            edges = torch.cat([now[:MARGIN], now[now.numel() - MARGIN :]])
            if bits is not None and not torch.equal(bits, now):
                raise AccessError(f"a kernel wrote into the input {name}")
            if bool((edges != _CANARIES[whole.dtype]).any()):
                raise AccessError(f"a kernel wrote beside {name}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Launches inside run on this machine."""
        builder = interpreter.interpreter_builder
        executor = interpreter.GridExecutor
        watch = _Watch(self)
        replaced = {
            "create_masked_load": watch.load, "create_masked_store": watch.store, "set_grid_dim": watch.set_grid_dim,
            "set_grid_idx": watch.set_grid_idx,
        }  # fmt: skip
        originals = (executor._init_args_hst, executor._restore_args_dev)
        for name, method in replaced.items():
            setattr(builder, name, method)
        executor._init_args_hst, executor._restore_args_dev = watch.begin, watch.end
        try:
            with _PoisonedAllocations(self):
                yield
        finally:
            executor._init_args_hst, executor._restore_args_dev = originals
            for name in replaced:
                delattr(builder, name)


class _PoisonedAllocations(TorchFunctionMode):
    """What launchers allocate without a value lies between margins and holds NaN."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _UNINITIALISED and result.numel() > 0 and result.device.type == self.machine.device:
            return self.machine.uninitialised(result, "scratch")
        return result


class _Watch:
    """Takes the place of some methods of the interpreter's builder and executor."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        builder = interpreter.interpreter_builder
        self.original_load, self.original_store = builder.create_masked_load, builder.create_masked_store
        self.original_dim, self.original_idx = builder.set_grid_dim, builder.set_grid_idx
        self.program = 0
        self.order: list[int] = []

    def begin(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The launch's arguments, which are on the host already; their spans are what it may reach."""
        self.reads: list[tuple[int, np.ndarray]] = []
        self.writes: list[tuple[int, np.ndarray]] = []
        tensors = [t for t in _tensors((*args, *kwargs.values())) if t.numel() > 0]
        self.readable = _Spans(tensors)
        self.writable = _Spans([t for t in tensors if t.untyped_storage().data_ptr() not in self.machine._read_only])
        return args, kwargs

    def end(self, *_: Any) -> None:
        """After the last program: no program may have written what another one wrote or read."""
        if not self.writes:
            return
        addresses, programs = _joined(self.writes)
        order = np.argsort(addresses, kind="stable")
        addresses, programs = addresses[order], programs[order]
        if bool(((addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1])).any()):
            raise AccessError("two programs of one launch write the same word")
        if not self.reads:
            return
        read, readers = _joined(self.reads)
        found = np.minimum(np.searchsorted(addresses, read), addresses.size - 1)
        if bool(((addresses[found] == read) & (programs[found] != readers)).any()):
            raise AccessError("a program reads a word that another program of its launch writes")

    def set_grid_dim(self, *grid: int) -> None:
        """A launch begins."""
        self.original_dim(*grid)
        self.grid = grid
        self.order = list(range(math.prod(grid)))
        if self.machine.choose is not None:
            self.machine.choose.shuffle(self.order)
        self.machine.launches.append("x".join(map(str, grid)))

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        """A program begins: the one whose turn it is in the random order."""
        self.program = self.order[(x * self.grid[1] + y) * self.grid[2] + z]
        rest, z = divmod(self.program, self.grid[2])
        self.original_idx(*divmod(rest, self.grid[1]), z)

    def load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
        reached = pointers.data[mask.data]
        self.readable.check(reached, pointers, "reads")
        if self.writable.overlaps(reached):
            self.reads.append((self.program, reached))
        return self.original_load(pointers, mask, *rest)

    def store(self, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        reached = pointers.data[mask.data]
        self.writable.check(reached, pointers, "writes")
        self.writes.append((self.program, reached))
        return self.original_store(pointers, value, mask, *rest)


class _Spans:
    """The memory between the first and the last element of each of some tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        spans: list[list[int]] = []
        for begin, end in sorted(_span(t) for t in tensors):
            if spans and begin <= spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([begin, end])
        self.begins, self.ends = (np.array([s[i] for s in spans], dtype=np.uint64) for i in range(2))

    def check(self, reached: np.ndarray, pointers: Any, verb: str) -> None:
        """Raise where an address lies outside."""
        if reached.size == 0:
            return
        last = np.uint64(max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
        index = np.searchsorted(self.begins, reached, side="right")
        if bool((index == 0).any()) or bool((reached + last > self.ends[index - 1]).any()):
            raise AccessError(f"a program {verb} outside the tensors of its launch")

    def overlaps(self, reached: np.ndarray) -> bool:
        """Whether an address lies inside."""
        if reached.size == 0 or self.begins.size == 0:
            return False
        index = np.searchsorted(self.begins, reached, side="right")
        return bool(((index > 0) & (reached < self.ends[np.maximum(index, 1) - 1])).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found


def _joined(accesses: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    addresses = np.concatenate([reached for _, reached in accesses])
    programs = np.concatenate([np.full(reached.size, program) for program, reached in accesses])
    return addresses, programs


def _patch_once() -> None:
    """Patch Triton's language for good, not anew at every call of a device function: that takes a third of the time."""
    original = interpreter._patch_lang
    nothing_to_restore = interpreter._LangPatchScope()
    patched: set[frozenset[str]] = set()

    def patch(fn: Any) -> Any:
        languages = (interpreter.tl, interpreter.tl.core)
        seen = frozenset(v.__name__ for v in fn.__globals__.values() if any(v is each for each in languages))
        if seen not in patched:
            patched.add(seen)
            original(fn)
        return nothing_to_restore

    interpreter._patch_lang = patch


_patch_once()


def failures_of(checks: Iterable[tuple[str, Callable[[], None]]]) -> int:
    """Run named checks; print those that fail, with why, and their number, which is returned."""
    failures = 0
    for name, check in checks:
        try:
            check()
        except Exception as error:
            failures += 1
            print(f"{name}: {type(error).__name__}: {error}")
    print(f"{failures} failures")
    return failures
