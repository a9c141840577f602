"""A frozen head and its loss with the gradient of the hidden states, against a linear layer and cross-entropy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import Contender, compare
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from prefix_fast.linear_loss import linear_cross_entropy


def composed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss as transformers computes it."""
    return cross_entropy(linear(hidden, weight).float(), targets)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same in chunks."""
    return linear_cross_entropy(hidden, weight, None, targets)


def step(loss: Callable[..., Tensor], *given: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Loss and gradient."""
    hidden, *rest = given

    def run() -> tuple[Tensor, ...]:
        states = hidden.detach().requires_grad_()
        value = loss(states, *rest)
        return value.detach(), *torch.autograd.grad(value, states)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_head_and_loss(benchmark: Any, record: Any, quick: bool, dtype: torch.dtype) -> None:
    rows, width, words = (16, 32, 500) if quick else (512, 768, 50257)
    generator = torch.Generator().manual_seed(0)
    given = (
        torch.randn(rows, width, generator=generator).to(dtype),
        (torch.randn(words, width, generator=generator) * 0.05).to(dtype),
        torch.randint(words, (rows,), generator=generator),
    )
    record(
        compare(
            benchmark,
            group="head and loss",
            case=f"{rows} labels, {width} wide, {words} words, {str(dtype)[6:]}",
            ours=Contender("linear_cross_entropy", step(ours, *given)),
            rivals=[Contender("linear + cross_entropy", step(composed, *given))],
            rounds=1 if quick else 6,
            tolerance=1e-4 if dtype == torch.float32 else 2e-2,
        )
    )
