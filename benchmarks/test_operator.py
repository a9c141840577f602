"""The operator against concatenation + SDPA and against a merge of torch's own flash attention; float32, H12 D64."""

from typing import Any

import pytest
import torch
from compare import Contender, compare
from rivals import merge
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prefix_fast import prefix_attention
from prefix_fast.speed import concatenation_attention, visible_keys

HEADS, HEAD_DIM = 12, 64
SHAPES = [(8, 128, 10), (8, 128, 200), (8, 128, 1024), (8, 512, 200)]
TOLERANCE = 1e-5
CONCATENATION, MERGE = "concatenation + SDPA", "torch flash, merged by lse"


def inputs(rows: int, queries: int, keys: int, prefix: int, grad: bool) -> list[Tensor]:
    """query, key, value, prefix_key, prefix_value."""
    shapes = [(rows, queries), (rows, keys), (rows, keys), (1, prefix), (1, prefix)]
    return [torch.randn(n, HEADS, t, HEAD_DIM, requires_grad=grad) for n, t in shapes]


def contender(name: str, function: Any, tensors: list[Tensor], grad_out: Tensor | None) -> Contender:
    """The function's forward, and its backward to all five tensors where grad_out is given."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*tensors),)

    def both() -> tuple[Tensor, ...]:
        out = function(*tensors)
        return (out.detach(), *torch.autograd.grad(out, tensors, grad_out))

    return Contender(name, forward if grad_out is None else both)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "B{}-T{}-P{}".format(*shape))
def test_training_shapes(benchmark: Any, record: Any, quick: bool, shape: tuple[int, int, int], backward: bool) -> None:
    rows, tokens, prefix = (2, 16, shape[2]) if quick else shape
    tensors = inputs(rows, tokens, tokens, prefix, grad=backward)
    # The mask is made once, outside the timed part: a model makes one for all its layers.
    mask = visible_keys(tensors[0], tensors[1], tensors[3])
    grad_out = torch.randn_like(tensors[0]) if backward else None
    record(
        compare(
            benchmark,
            group="operator",
            case=f"{'forward + backward' if backward else 'forward'}, B{rows} T{tokens} P{prefix}",
            ours=contender("prefix_attention", prefix_attention, tensors, grad_out),
            rivals=[
                contender(CONCATENATION, lambda *args: concatenation_attention(*args, mask), tensors, grad_out),
                contender(MERGE, merge, tensors, grad_out),
            ],
            rounds=2 if quick else 12,
            tolerance=TOLERANCE,
            headlines=[CONCATENATION] if backward else [],
        )
    )


def test_decode(benchmark: Any, record: Any, quick: bool) -> None:
    rows, own, prefix = (4, 16, 64) if quick else (64, 64, 1024)
    tensors = inputs(rows, 1, own, prefix, grad=False)
    mask = visible_keys(tensors[0], tensors[1], tensors[3])
    keys = torch.cat([tensors[3].expand(rows, -1, -1, -1), tensors[1]], 2)
    values = torch.cat([tensors[4].expand(rows, -1, -1, -1), tensors[2]], 2)
    cached = "SDPA, cache concatenated before"
    record(
        compare(
            benchmark,
            group="decode step",
            case=f"B{rows} T{own} P{prefix}",
            ours=contender("prefix_attention", prefix_attention, tensors, None),
            rivals=[
                contender(CONCATENATION, lambda *args: concatenation_attention(*args, mask), tensors, None),
                contender(cached, lambda *_: scaled_dot_product_attention(tensors[0], keys, values), tensors, None),
                contender(MERGE, merge, tensors, None),
            ],
            rounds=2 if quick else 12,
            tolerance=TOLERANCE,
            headlines=[CONCATENATION, cached],
        )
    )
