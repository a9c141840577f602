"""The operator's rivals, in plain PyTorch.

Shapes: query, key, value [B, H, T, D]; prefix_key, prefix_value [1, H, P, D]; the prefix is visible to every query, own
keys up to the query.
"""

from typing import Any

import torch
from torch import Tensor

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def stack_rows(x: Tensor) -> Tensor:
    """[B, H, T, D] → [1, H, B·T, D]: the queries of all rows as those of one."""
    return x.transpose(0, 1).reshape(1, x.shape[1], -1, *x.shape[3:])


def unstack_rows(x: Tensor, rows: int) -> Tensor:
    """The inverse of `stack_rows`."""
    return x[0].unflatten(1, (rows, -1)).transpose(0, 1)


class Merge(torch.autograd.Function):
    """The strongest rival without own kernels: torch's flash attention for each part, merged by log-sum-exp.

    lse = logaddexp(lse₁, lse₂), out = out₁ e^{lse₁ - lse} + out₂ e^{lse₂ - lse}. The backward of each part takes the
    merged out and lse, so that p_ij = e^{s_ij - lse_i} is already that of the whole softmax.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor
    ) -> Tensor:
        rows = query.shape[0]
        causal = query.shape[2] > 1
        stacked, stacked_lse = flash(stack_rows(query), prefix_key, prefix_value)
        own, own_lse = flash(query, key, value, is_causal=causal)
        shared, shared_lse = unstack_rows(stacked, rows), unstack_rows(stacked_lse, rows)
        lse = torch.logaddexp(shared_lse, own_lse)
        shared_part, own_part = ((x - lse).exp().unsqueeze(-1).to(query.dtype) for x in (shared_lse, own_lse))
        out = shared * shared_part + own * own_part
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        query, key, value, prefix_key, prefix_value, out, lse = ctx.saved_tensors
        grad_shared, grad_prefix_key, grad_prefix_value = flash_backward(
            stack_rows(grad_out),
            stack_rows(query),
            prefix_key,
            prefix_value,
            stack_rows(out),
            stack_rows(lse),
            0.0,
            False,
        )
        grad_own, grad_key, grad_value = flash_backward(grad_out, query, key, value, out, lse, 0.0, ctx.causal)
        grad_query = unstack_rows(grad_shared, query.shape[0]) + grad_own
        return grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value


def merge(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
    """`Merge` as a function."""
    return Merge.apply(query, key, value, prefix_key, prefix_value)


def gemm_merge(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
    """The strongest rival in decoding: matrix products, the prefix's over the stacked queries, merged by their sums.

    m = max(m₁, m₂), out = (O₁ e^{m₁ - m} + O₂ e^{m₂ - m}) / (l₁ e^{m₁ - m} + l₂ e^{m₂ - m}); all keys are visible.
    """
    scaled = query * query.shape[-1] ** -0.5
    shared = [unstack_rows(x, query.shape[0]) for x in _softmax_parts(stack_rows(scaled), prefix_key, prefix_value)]
    own = _softmax_parts(scaled, key, value)
    maximum = torch.maximum(shared[0], own[0])
    left, right = (shared[0] - maximum).exp_(), (own[0] - maximum).exp_()
    return (shared[2] * left + own[2] * right) / (shared[1] * left + own[1] * right)


def _softmax_parts(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of weights, and weighted sum of values."""
    scores = query @ key.transpose(-1, -2)
    maximum = scores.amax(-1, keepdim=True)
    weights = scores.sub_(maximum).exp_()
    return maximum, weights.sum(-1, keepdim=True), weights @ value
