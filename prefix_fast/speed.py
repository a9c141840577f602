"""A quick, parity-checked measurement of the operator against its rival: concatenate the prefix, call SDPA."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_fast.functional import prefix_attention


class Shape(NamedTuple):
    """Sizes of one training step's attention: B rows of T tokens, one shared prefix of P."""

    B: int = 8
    H: int = 12
    T: int = 128
    P: int = 200
    D: int = 64

    def __str__(self) -> str:
        return f"B{self.B} H{self.H} T{self.T} P{self.P} D{self.D}"


DEFAULT_SHAPES = (Shape(P=10), Shape(P=200), Shape(P=1024), Shape(T=512, P=200))


class Measurement(NamedTuple):
    """Median seconds of forward and backward, ours and the rival's, and the largest difference of any result."""

    shape: Shape
    ours: float
    rival: float
    difference: float

    @property
    def ratio(self) -> float:
        """How many times faster than the rival; below 1 is slower."""
        return self.rival / self.ours


def visible_keys(query: Tensor, key: Tensor, prefix_key: Tensor) -> Tensor:
    """The bool mask [Tq, P + Tk] that SDPA needs: its own causal flag does not know of a prefix."""
    Tq, Tk, P = query.shape[2], key.shape[2], prefix_key.shape[2]
    return torch.ones(Tq, P + Tk, dtype=torch.bool, device=query.device).tril(P + Tk - Tq)


def concatenation_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """What PEFT and transformers do with a prefix [1, Hkv, P, D]: a copy for every row, concatenated, then SDPA."""
    B = query.shape[0]
    keys = torch.cat([prefix_key.expand(B, -1, -1, -1), key], dim=2)
    values = torch.cat([prefix_value.expand(B, -1, -1, -1), value], dim=2)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout_p, enable_gqa=grouped)


def measure(
    shapes: Iterable[Shape] = DEFAULT_SHAPES,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str = "auto",
    repeats: int = 10,
) -> Iterator[Measurement]:
    """Measure each shape: both sides warmed, then timed in turns; all five gradients are computed.

    Raises:
        ArithmeticError: the results differ by more than rounding; a time would then mean nothing.
    """
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        own, shared = (shape.B, shape.H, shape.T, shape.D), (1, shape.H, shape.P, shape.D)
        leaves = [
            torch.randn(size, generator=generator).to(device, dtype).requires_grad_()
            for size in (own, own, own, shared, shared)
        ]
        grad_out = torch.randn(own, generator=generator).to(device, dtype)

        def ours(leaves: list[Tensor] = leaves) -> Tensor:
            out, _ = prefix_attention(*leaves, backend=backend, return_lse=True)
            return out

        # The mask is made outside the timed part: a model makes one for all its layers.
        masked = [*leaves, visible_keys(leaves[0], leaves[1], leaves[3])]

        def rival(masked: list[Tensor] = masked) -> Tensor:
            return concatenation_attention(*masked)

        difference = _largest_difference(_run(ours, leaves, grad_out), _run(rival, leaves, grad_out))
        allowed = 1e-4 if dtype == torch.float32 else 5e-2
        if not difference <= allowed:
            raise ArithmeticError(f"bench: expected equal results within {allowed} at {shape}, got {difference:.2e}")
        times: dict[Callable[[], Tensor], list[float]] = {ours: [], rival: []}
        for _ in range(repeats):
            for side, seconds in times.items():
                seconds.append(_seconds(side, leaves, grad_out))
        yield Measurement(shape, statistics.median(times[ours]), statistics.median(times[rival]), difference)


def _run(side: Callable[[], Tensor], leaves: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    out = side()
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def _largest_difference(ours: list[Tensor], rival: list[Tensor]) -> float:
    """Largest absolute difference, relative to each result's largest value where that exceeds 1."""
    return max(
        float((a.float() - b.float()).abs().max() / max(1.0, float(b.abs().max())))
        for a, b in zip(ours, rival, strict=True)
    )


def _seconds(side: Callable[[], Tensor], leaves: list[Tensor], grad_out: Tensor) -> float:
    on_gpu = leaves[0].device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    _run(side, leaves, grad_out)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started
