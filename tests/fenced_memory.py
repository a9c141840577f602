"""Tensors that border on memory which nobody may touch: one byte read or written beyond them ends the process."""

import ctypes
import mmap
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefix_fast.backends.problem import Problem

_C = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS = 0


def fenced(tensor: Tensor, side: str) -> Tensor:
    """A copy in the same order of dimensions, whose first byte ("start") or last ("end") is at the fence."""
    if tensor.numel() == 0:
        return tensor
    order = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
    size = tensor.numel() * tensor.element_size()
    inner = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for fence in (address, address + mmap.PAGESIZE + inner):
        if _C.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(mmap.PAGESIZE), _NO_ACCESS) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = mmap.PAGESIZE + (inner - size if side == "end" else 0)
    flat = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    copy = flat.view([tensor.shape[d] for d in order]).permute([order.index(d) for d in range(tensor.dim())])
    return copy.copy_(tensor)


def fenced_problem(problem: Problem, side: str) -> Problem:
    """The same call on fenced copies of all its tensors."""

    def fence(holder: Any) -> dict[str, Tensor]:
        return {name: fenced(t, side) for name, t in vars(holder).items() if isinstance(t, Tensor)}

    return replace(problem, **fence(problem), sets=tuple(replace(s, **fence(s)) for s in problem.sets))
