"""A frozen head and its loss together, without the logits: which heads that holds for, and which rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefix_fast import half, linears
from prefix_fast.linear_loss import linear_cross_entropy


class FrozenHead(NamedTuple):
    """The logits' weight [V, hidden] and bias [V]."""

    weight: Tensor
    bias: Tensor | None

    def loss(self, hidden: Tensor, targets: Tensor, ignored: int, **options: Any) -> Tensor:
        """Of hidden states [..., hidden] with a target each; options: see `linear_cross_entropy`.

        The number of labels is data, and on a GPU a read of it waits for the device: there all rows are computed.
        """
        if hidden.device.type == "cpu":
            chosen = targets != ignored
            hidden, targets = hidden[chosen], targets[chosen]
        return linear_cross_entropy(hidden, self.weight, self.bias, targets, ignore_index=ignored, **options)


def frozen_head(head: Any, extra_bias: Tensor | None = None) -> FrozenHead | None:
    """The head, if it is a plain linear layer that is not trained and whose call nothing watches or replaces.

    Args:
        head: of the model.
        extra_bias: [..., V], what the model adds to its logits.
    """
    own_class = getattr(type(head), "_prefix_fast_class", type(head))  # without what `linears` makes of it
    if own_class is not nn.Linear or torch.compiler.is_compiling() or linears.is_watched(head):
        return None
    if any(getattr(nn.modules.module, f"_global{name}") for name in linears.HOOKS):
        return None
    tensors = [tensor for tensor in (head.weight, head.bias, extra_bias) if tensor is not None]
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.requires_grad for tensor in tensors):
        return None
    _, weight, bias = half.operands_of(head)
    if extra_bias is not None:
        extra_bias = extra_bias.reshape(-1).to(weight)
        bias = extra_bias if bias is None else bias + extra_bias
    return FrozenHead(weight, bias)
