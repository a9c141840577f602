"""Which backend runs a call, and why the others do not.

A backend asked for by name runs or raises; only "auto" chooses, by static facts alone (device, dtype, head dim and the
arguments in use, never values), in the order of the table; of Triton's and CUDA's kernels it takes those that were, or
should be, faster on the card (`backends.cuda_vetting`).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_fast import ops
from prefix_fast.backends.cuda_vetting import FEW_QUERIES
from prefix_fast.backends.problem import Facts, Problem

ORDER = ("triton", "cuda", "cpu", "reference")  # what "auto" tries
NAMES = ("auto", *ORDER)
MOST_SETS_OF_CUDA = 4


class BackendInfo(NamedTuple):
    """One line of `backends()`."""

    name: str
    available: bool
    reason: str  # why it is not available; empty where it is
    device: str  # device type of the tensors it takes


def backends() -> list[BackendInfo]:
    """Every backend in the order that "auto" tries them, with the reason where one cannot run on this machine."""
    infos = []
    for name in ORDER:
        backend = ops.load_backend(name)
        reason = backend.availability()
        infos.append(BackendInfo(name, reason is None, reason or "", backend.device()))
    return infos


def unsupported_reasons(name: str, facts: Facts) -> list[str]:
    """Why the backend cannot serve a call with these facts. Empty: it can."""
    backend = ops.load_backend(name)
    reason = backend.availability()
    return [reason] if reason else backend.unsupported_reasons(facts)


def segment_attention(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Run `problem` on the backend of that name, or on the one that "auto" chooses."""
    facts = facts_of(problem)
    return ops.segment_attention(problem, choose(backend, *facts))


def facts_of(problem: Problem) -> Facts:
    """The static facts of a call."""
    sets, query = problem.sets, problem.query
    present = {
        "softcap": problem.softcap is not None,
        "window": problem.window is not None,
        "sinks": problem.sinks is not None,
        "segment_bias": any(s.bias is not None for s in sets),
        "dropout": problem.dropout_p > 0,
        "packed": problem.cu_seqlens_q is not None or any(s.cu_seqlens is not None for s in sets),
        "mixed_prefix": any(s.key.dtype != query.dtype for s in sets),
        "many_sets": len(sets) > MOST_SETS_OF_CUDA,
    }
    uses = tuple(name for name, used in present.items() if used)
    head_dim = len(range(query.shape[-1]))  # a plain int: tracing with dynamic shapes makes it a constant, unlike int()
    # Tracing with dynamic shapes compiles anew past this number, so it is asked where it can matter.
    few = query.is_cuda and problem.cu_seqlens_q is None and query.shape[2] <= FEW_QUERIES
    return Facts(query.device.type, query.dtype, head_dim, uses, query.device.index or 0, few)


def choose(
    backend: str, device: str, dtype: torch.dtype, head_dim: int, uses: tuple[str, ...], device_index: int = 0,
    few_queries: bool = False,
) -> str:  # fmt: skip
    """The name of the backend that runs a call with these facts.

    "auto" never runs Triton on CPU tensors: its interpreter there is for tests, which ask for it by name.

    Raises:
        ValueError: no backend has that name.
        NotImplementedError: the backend asked for cannot run the call; the message holds every reason.
    """
    source = "backend"
    if backend == "auto" and "PREFIX_FAST_BACKEND" in os.environ:
        backend, source = os.environ["PREFIX_FAST_BACKEND"], "the environment variable PREFIX_FAST_BACKEND"
    if backend not in NAMES:
        raise ValueError(f"prefix_fast: expected {source} to be one of {', '.join(NAMES)}, got {backend!r}")
    facts = Facts(device, dtype, head_dim, uses, device_index, few_queries)
    candidates: tuple[str, ...] = (backend,)
    if backend == "auto":
        candidates = tuple(name for name in _ordered(facts) if name != "triton" or device != "cpu")
    reasons = {}
    for name in candidates:
        reasons[name] = unsupported_reasons(name, facts)
        if not reasons[name]:
            return name
    listed = "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())
    raise NotImplementedError(
        f"prefix_fast: expected a call that {source}={backend!r} can run, got {dtype} on {device} with head dim "
        f"{head_dim} and {', '.join(uses) or 'no special argument'}. {listed}. Pass backend='auto' for another"
    )


def _ordered(facts: Facts) -> tuple[str, ...]:
    if facts.device != "cuda" or not ops.load_backend("cuda").is_preferred(facts):
        return ORDER
    return ("cuda", *(name for name in ORDER if name != "cuda"))


# Tracing takes the choice as a constant. This is what torch.compiler.assume_constant_result does, which first imports
# torch._dynamo: as long as importing torch itself.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
