"""The `triton` backend: launches the kernels of `prefix_fast.kernels` on CUDA and ROCm devices.

With TRITON_INTERPRET=1 in the environment before the first call, Triton's interpreter runs them on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor

from prefix_fast.backends import triton_backward, triton_forward, triton_vetting
from prefix_fast.backends.problem import Facts, Grads, Problem
from prefix_fast.backends.triton_call import Call, make_call, near
from prefix_fast.backends.triton_config import Tiles, device_of, safe_tiles
from prefix_fast.backends.triton_vetting import Trial

NAME = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
OLDEST = (3, 6)


def availability() -> str | None:
    """None where the backend can run; otherwise why not."""
    version = _triton_version()
    if version is None:
        return "triton is not installed; install prefix-fast[triton]"
    if version < OLDEST:
        return f"expected triton >= {_dotted(OLDEST)}, got {_dotted(version)}; upgrade triton"
    if not (torch.cuda.is_initialized() or interpreting() or torch.cuda.is_available()):
        return "this machine has no CUDA or ROCm device; TRITON_INTERPRET=1 runs the kernels on the CPU, for tests"
    return None


def device() -> str:
    """Device type of the tensors it takes."""
    return "cpu" if interpreting() else "cuda"


def unsupported_reasons(facts: Facts) -> list[str]:
    """Why a call with these facts cannot run here. Empty: it can."""
    reasons = []
    if facts.dtype not in DTYPES:
        reasons.append(f"the triton backend takes float32, bfloat16 and float16, not {str(facts.dtype)[6:]}")
    if facts.head_dim > MAX_HEAD_DIM:
        reasons.append(f"the triton backend takes head dims up to {MAX_HEAD_DIM}, not {facts.head_dim}")
    interpreted = interpreting()
    wanted = "cpu" if interpreted else "cuda"
    if facts.device != wanted:
        why = "with TRITON_INTERPRET=1" if interpreted else "(on the CPU only with TRITON_INTERPRET=1)"
        reasons.append(f"the triton backend takes {wanted} tensors {why}, not {facts.device}")
    index = None if interpreted else facts.device_index
    if index is not None and facts.device == wanted:
        reasons += triton_vetting.device_refusals(index)
    if reasons:
        return reasons
    kind = triton_vetting.kind_of(facts.head_dim, facts.dtype, "mixed_prefix" in facts.uses)
    return triton_vetting.refusals(index, kind)


def forward(problem: Problem, out: Tensor, lse: Tensor, trial: Trial | None = None) -> None:
    """Write every element of out and of lse; see `prefix_fast.kernels.prefix_attention_fwd` for the formula."""
    if out.numel() == 0:
        return
    with torch.cuda.device_of(problem.query):  # a launch goes to the current device
        call, tiles = _prepare(problem, trial)
        triton_forward.forward(call, tiles, out, lse)


def backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads: Grads,
    trial: Trial | None = None,
) -> None:  # fmt: skip
    """Write every element of every gradient that is wanted, and compute no other."""
    if grads.are_zeros(out):
        return
    packed = problem.cu_seqlens_q is not None
    grad_out = near(grad_out, -3 if packed else -2) if grad_out.stride(-1) == 1 else grad_out.contiguous()
    grad_lse = None if grad_lse is None else near(grad_lse, -2 if packed else -1)
    with torch.cuda.device_of(problem.query):
        call, tiles = _prepare(problem, trial)
        triton_backward.backward(call, tiles, out, lse, grad_out, grad_lse, grads)


def _prepare(problem: Problem, trial: Trial | None) -> tuple[Call, Tiles]:
    """The call and its tiles; on trial, one kernel has the tile that is tried, and the others their safe ones."""
    index = problem.query.device.index if problem.query.device.type == "cuda" else None
    call = make_call(problem, device_of(index), interpreting())
    if trial is None:
        return call, triton_vetting.tiles_of_call(index, call.kind)
    tiles = safe_tiles(call.block_d)._replace(**{trial.kernel: trial.tile})
    return call._replace(trial=trial.kernel, spare=False), tiles


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _triton_version() -> tuple[int, ...] | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # another distribution ships the module
        return OLDEST
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
