"""Calls that the Triton backend must refuse, with the reason and before anything is launched.

Run as a program with TRITON_INTERPRET=1; prints each that is not refused as it should be.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton_harness import Machine

from prefix_fast import prefix_attention, segment_attention

B, H, HKV, T, P, D = 2, 4, 2, 3, 5, 16


def attend(**changes: Any) -> Tensor:
    """A call that is right but for the changes."""
    changes = {name: change() if callable(change) else change for name, change in changes.items()}
    arguments = {
        "query": torch.randn(B, H, T, D), "key": torch.randn(B, HKV, T, D), "value": torch.randn(B, HKV, T, D),
        "prefix_key": torch.randn(1, HKV, P, D), "prefix_value": torch.randn(1, HKV, P, D), **changes,
    }  # fmt: skip
    return prefix_attention(**arguments, backend="triton")


def of(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Callable[[], Tensor]:
    """Makes a tensor when it is called."""
    return lambda: torch.ones(shape, dtype=dtype, device=device)


def all_tensors(head_dim: int = D, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Tensor]]:
    """Changes every tensor of a call."""
    heads = {"query": (B, H, T), "key": (B, HKV, T), "value": (B, HKV, T)}
    heads |= {"prefix_key": (1, HKV, P), "prefix_value": (1, HKV, P)}
    return {name: of(*shape, head_dim, dtype=dtype) for name, shape in heads.items()}


def second_derivative() -> None:
    """A gradient of a gradient."""
    query = torch.randn(B, H, T, D, requires_grad=True)
    (grad,) = torch.autograd.grad(attend(query=query).square().sum(), query, create_graph=True)
    launched = len(MACHINE.launches)
    try:
        grad.sum().backward()
    finally:
        del MACHINE.launches[:launched]


def wrong_plan() -> Tensor:
    """A plan of other ids."""
    from prefix_fast import Segment
    from prefix_fast.backends.problem import make_plan

    key = torch.randn(2, HKV, P, D)
    segment = Segment(key, key, ids=torch.tensor([0, 1]), plan=make_plan(torch.tensor([1, 1]), 2))
    own = torch.randn(B, HKV, T, D)
    return segment_attention(torch.randn(B, H, T, D), own, own, [segment], backend="triton")


MACHINE = Machine()
REFUSALS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "float64": (
        lambda: attend(**all_tensors(dtype=torch.float64)), NotImplementedError,
        r"triton: the triton backend takes float32, bfloat16 and float16, not float64",
    ),
    "integers": (lambda: attend(**all_tensors(dtype=torch.int32)), TypeError, "expected query in float32.*int32"),
    "head dim 257": (
        lambda: attend(**all_tensors(257)), NotImplementedError,
        "triton: the triton backend takes head dims up to 256, not 257",
    ),
    "both": (
        lambda: attend(**all_tensors(257, torch.float64)), NotImplementedError, "not float64.*up to 256, not 257",
    ),
    "other dtypes of keys": (
        lambda: attend(key=of(B, HKV, T, D, dtype=torch.float16)), TypeError, "expected key in query's dtype",
    ),
    "a half-precision prefix beside float32": (
        lambda: attend(**{name: of(1, HKV, P, D, dtype=torch.float16) for name in ("prefix_key", "prefix_value")}),
        TypeError, "expected prefix_key in query's dtype torch.float32, got torch.float16",
    ),
    "another device": (
        lambda: attend(prefix_key=of(1, HKV, P, D, device="meta")), ValueError, "on query's device cpu, got meta",
    ),
    "a stride in the last dim": (
        lambda: attend(query=torch.randn(B, H, D, T).transpose(2, 3)), TypeError, "contiguous last dim, got stride 3",
    ),
    "a sparse tensor": (
        lambda: attend(key=torch.randn(B, HKV, T, D).to_sparse()), TypeError, "expected key to be a dense strided",
    ),
    "heads that are no multiple": (
        lambda: attend(query=of(B, 3, T, D)), ValueError, "a multiple of key's, got H=3 and Hkv=2",
    ),
    "an id that no segment has": (
        lambda: attend(prefix_ids=torch.tensor([0, 1])), ValueError, r"in \[-1, 1\), got values from 0 to 1",
    ),
    "a length beyond the prefix": (
        lambda: attend(prefix_lengths=torch.tensor([P + 1])), ValueError, r"between 0 and .*got \[6\]",
    ),
    "a bias that wants a gradient": (
        lambda: attend(attn_bias=torch.ones(T, T, requires_grad=True)), NotImplementedError,
        r"pass attn_bias.detach\(\)",
    ),
    "a plan of other ids": (wrong_plan, ValueError, "expected the plan of segment set 0 to be make_plan"),
    "a second derivative": (second_derivative, NotImplementedError, "second derivatives exist on backend='reference'"),
}  # fmt: skip


def fault(call: Callable[[], object], error: type[Exception], message: str) -> str:
    """What is wrong with a refusal; empty: nothing."""
    MACHINE.launches.clear()
    try:
        with MACHINE.running():
            call()
    except Exception as raised:
        if type(raised) is not error or not re.search(message, str(raised)):
            return f"raised {type(raised).__name__}: {raised}"
        return f"launched {len(MACHINE.launches)} kernels first" if MACHINE.launches else ""
    return "was not refused"


def main(arguments: list[str]) -> int:
    """Print what is wrong. Returns the number."""
    torch.manual_seed(0)
    with MACHINE.running():
        attend()
    found = [] if MACHINE.launches else ["a right call launches nothing that is seen"]
    found += [f"{name}: {wrong}" for name, refusal in REFUSALS.items() if (wrong := fault(*refusal))]
    print(*found, f"{len(found)} faults", sep="\n")
    return len(found)
