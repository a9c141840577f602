"""The same call in memory of more than 2^31 elements: strides so long that int32 cannot hold the offsets.

All tensors lie interleaved in one mapping of reserved addresses, of which only the pages that hold data take memory.
Run as a program with TRITON_INTERPRET=1; arguments: the names of far calls, none for all. Each must give the bits of
the same call in dense memory.
"""

import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from triton_harness import Machine, failures_of, words

from prefix_fast.backends import triton
from prefix_fast.backends.problem import Grads, Problem
from prefix_fast.backends.triton_config import Tile
from prefix_fast.backends.triton_vetting import Trial
from prefix_fast.testing import Case, float_tensors, make_problem, output_grads, with_float_tensors

BYTES = 18 << 30
ROOM = 1 << 20  # bytes for the elements of one tensor that lie close together


@dataclass(frozen=True)
class Far:
    """A case, and the dimension of each of some tensors (by name) whose stride is `stride`."""

    case: Case
    dims: dict[str, int]
    stride: int
    path: Trial | None = None  # of the forward pass; with one, dq and dkv serve the backward pass


_ROWS = Case(B=4, H=2, Hkv=2, Tq=5, Tk=5, N=4, P=5, ids="random", dtype=torch.float16, seed=1)
_HEADS = Case(B=1, H=4, Hkv=4, Tq=5, Tk=5, P=5, dtype=torch.float16, seed=2)
_TOKENS = Case(B=1, H=1, Hkv=1, Tq=33, Tk=33, P=33, dtype=torch.float16, seed=3)
_PACKED = Case(B=20, H=1, Hkv=1, Tq=17, Tk=17, N=20, P=17, ids="random", packed=True, packed_segments=True,
               dtype=torch.float16, seed=4)  # fmt: skip
_MASKED = Case(B=1, H=2, Hkv=1, Tq=5, Tk=34, P=33, key_mask="scattered", attn_bias=True, options={"segment_bias": True},
               dtype=torch.float16, seed=5)  # fmt: skip
_QUERIES = ("query", "out", "grad_out", "lse", "grad_lse", "grad.query")
_KEYS = ("key", "value", "segment0.key", "segment0.value")
_OWN_GRADS = ("grad.key", "grad.value")
_SPLIT = Trial("split", Tile(16, 32, 1, 1))
_BILLION = 2**30 - 16

CALLS = {
    "rows": Far(_ROWS, dict.fromkeys(_QUERIES, 0), _BILLION),
    "segments": Far(_ROWS, dict.fromkeys((*_KEYS, *_OWN_GRADS), 0), _BILLION),
    "heads": Far(_HEADS, dict.fromkeys(_QUERIES, 1), _BILLION),
    "key heads": Far(_HEADS, dict.fromkeys((*_KEYS, *_OWN_GRADS), 1), _BILLION),
    "tokens": Far(_TOKENS, dict.fromkeys(("query", "grad_out", "grad_lse"), 2), 2**26 + 16),
    "key tokens": Far(_TOKENS, dict.fromkeys(_KEYS, 2), 2**26 + 16),
    "long rows": Far(
        replace(_TOKENS, Tq=161, Tk=161, P=161),
        dict.fromkeys((*_QUERIES, *_KEYS), 2),
        2**24 - 16,
    ),
    "packed tokens": Far(_PACKED, dict.fromkeys(_QUERIES, 0), 2**24 - 16),
    "packed keys": Far(_PACKED, dict.fromkeys((*_KEYS, *_OWN_GRADS), 0), 2**24 - 16),
    "bias queries": Far(_MASKED, {"attn_bias": 2, "bias0": 2}, 2**29 + 16),
    "split rows": Far(_ROWS, dict.fromkeys(_QUERIES, 0), _BILLION, _SPLIT),
    "split segments": Far(_ROWS, dict.fromkeys((*_KEYS, *_OWN_GRADS), 0), _BILLION, _SPLIT),
    "split heads": Far(_HEADS, dict.fromkeys(_QUERIES, 1), _BILLION, _SPLIT),
    "split key heads": Far(_HEADS, dict.fromkeys((*_KEYS, *_OWN_GRADS), 1), _BILLION, _SPLIT),
    "split bias queries": Far(_MASKED, {"attn_bias": 2, "bias0": 2}, 2**29 + 16, _SPLIT),
    "split offsets": Far(replace(_ROWS, query_offset="rows"), {"query_offset": 0}, _BILLION, _SPLIT),
    "offsets": Far(replace(_ROWS, query_offset="rows"), {"query_offset": 0}, _BILLION),
    "bias keys": Far(_MASKED, {"attn_bias": 3, "bias0": 3, "key_mask": 1}, 9 * 2**23),
}


class Mapping:
    """One stretch of addresses, from whose start on tensors begin side by side."""

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self.memory = torch.frombuffer(mmap.mmap(-1, BYTES, flags=flags), dtype=torch.uint8)
        self.used = ROOM

    def place(self, like: Tensor, dim: int, stride: int, values: Tensor | None = None) -> Tensor:
        """A tensor of that shape and dtype, dense but for one dimension."""
        rest = [n for i, n in enumerate(like.shape) if i != dim]
        close = iter(torch.empty(rest).stride())
        strides = [stride if i == dim else next(close) for i in range(like.dim())]
        begin = self.used
        self.used += ROOM
        placed = self.memory[begin:].view(like.dtype).as_strided(like.shape, strides)
        return placed.fill_(torch.nan) if values is None else placed.copy_(values)


def evaluate(far: Far, mapping: Mapping | None) -> dict[str, Tensor]:
    """out, lse and every gradient; with a mapping, from tensors that lie in it."""
    plain = make_problem(far.case)
    grad_out, grad_lse = output_grads(plain)
    machine = Machine(order=far.case.seed)

    def given(tensor: Tensor, name: str) -> Tensor:
        if mapping is None or name not in far.dims:
            return machine.input(tensor.contiguous(), name)
        return mapping.place(tensor, far.dims[name], far.stride, tensor)

    def wanted(like: Tensor, name: str) -> Tensor:
        if mapping is None or name not in far.dims:
            return machine.uninitialised(like.contiguous(), name)
        return mapping.place(like, far.dims[name], far.stride)

    named = {name: given(t, name) for name, t in float_tensors(plain).items()}
    problem = _with_masks(with_float_tensors(plain, named), given)
    out, lse = wanted(plain.query, "out"), wanted(plain.query[..., 0].float(), "lse")
    grads = {name: wanted(t, f"grad.{name}") for name, t in named.items()}
    of_sets = tuple((grads[f"segment{i}.key"], grads[f"segment{i}.value"]) for i in range(len(problem.sets)))
    with machine.running():
        triton.forward(problem, out, lse, far.path)
        triton.backward(
            problem, out, lse, given(grad_out, "grad_out"), given(grad_lse.float(), "grad_lse"),
            Grads(grads["query"], grads["key"], grads["value"], of_sets), far.path,
        )  # fmt: skip
    machine.assert_intact()
    return {"out": out, "lse": lse, **{f"grad.{name}": grad for name, grad in grads.items()}}


def _with_masks(problem: Problem, given: Callable[[Tensor, str], Tensor]) -> Problem:
    sets = tuple(
        s if s.bias is None else replace(s, bias=given(s.bias, f"bias{i}")) for i, s in enumerate(problem.sets)
    )
    bias, mask, offset = problem.attn_bias, problem.key_mask, problem.query_offset
    if isinstance(offset, Tensor):
        offset = given(offset.int(), "query_offset")
    return replace(
        problem, sets=tuple(sets), attn_bias=None if bias is None else given(bias, "attn_bias"),
        key_mask=None if mask is None else given(mask, "key_mask"), query_offset=offset,
    )  # fmt: skip


def check(far: Far) -> None:
    """Compare the bits of far and near."""
    near, distant = evaluate(far, None), evaluate(far, Mapping())
    for name, tensor in near.items():
        if not torch.equal(words(tensor.contiguous()), words(distant[name].contiguous())):
            raise AssertionError(f"{name} is another one in far memory")


def main(arguments: list[str]) -> int:
    """Check the named far calls; print the failures. Returns their number."""
    torch.set_num_threads(1)
    return failures_of((name, partial(check, CALLS[name])) for name in arguments or CALLS)
