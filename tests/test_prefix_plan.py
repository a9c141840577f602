"""The plan of a batch: made once, shared by calls, held against the ids on the CPU."""

import pytest
import torch

import prefix_fast
from prefix_fast.functional import Segment, segment_attention


def tensors(B: int = 5, H: int = 2, T: int = 3, N: int = 3, P: int = 4, D: int = 16) -> tuple:
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(B, H, T, D, generator=generator) for _ in range(3)]
    return *own, *(torch.randn(N, H, P, D, generator=generator) for _ in range(2))


def test_plan_sorts_rows_by_segment_and_those_that_read_none_last() -> None:
    ids = torch.tensor([2, -1, 0, 2, 7, 0])
    order, starts = prefix_fast.make_plan(ids, 3)
    assert order.tolist() == [2, 5, 0, 3, 1, 4]
    assert starts.tolist() == [0, 2, 2, 4, 6]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_plan_of_an_empty_batch_is_empty(dtype: torch.dtype) -> None:
    order, starts = prefix_fast.make_plan(torch.zeros(0, dtype=dtype), 2)
    assert order.shape == (0,) and starts.tolist() == [0, 0, 0, 0]


def test_a_call_with_a_plan_equals_one_without() -> None:
    query, key, value, prefix_key, prefix_value = tensors()
    ids = torch.tensor([1, -1, 0, 2, 1])
    plan = prefix_fast.make_plan(ids, 3)
    with_plan = prefix_fast.prefix_attention(query, key, value, prefix_key, prefix_value, prefix_ids=ids, plan=plan)
    without = prefix_fast.prefix_attention(query, key, value, prefix_key, prefix_value, prefix_ids=ids)
    assert torch.equal(with_plan, without)


def test_a_plan_of_other_ids_raises() -> None:
    query, key, value, prefix_key, prefix_value = tensors()
    ids = torch.tensor([1, -1, 0, 2, 1])
    stale = prefix_fast.make_plan(ids.flip(0), 3)
    with pytest.raises(ValueError, match="make it again when ids change"):
        prefix_fast.prefix_attention(query, key, value, prefix_key, prefix_value, prefix_ids=ids, plan=stale)


def test_a_plan_that_is_none_raises() -> None:
    query, key, value, prefix_key, prefix_value = tensors()
    ids = torch.tensor([1, -1, 0, 2, 1])
    plan = prefix_fast.make_plan(ids, 3)
    with pytest.raises(TypeError, match="expected a plan made by make_plan"):
        segment_attention(query, key, value, Segment(prefix_key, prefix_value, ids, plan=(*plan,)))
    with pytest.raises(TypeError, match="beside the ids"):
        segment_attention(query, key, value, Segment(prefix_key[:1], prefix_value[:1], plan=plan))
    wrong = prefix_fast.Plan(plan.order, plan.starts[1:])
    with pytest.raises(ValueError, match=r"plan.starts \[N \+ 2\]"):
        segment_attention(query, key, value, Segment(prefix_key, prefix_value, ids, plan=wrong))
