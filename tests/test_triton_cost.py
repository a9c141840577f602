"""The roofline: figures worked out by hand, and what must hold of any card and shape."""

import pytest
import torch

from prefix_fast import prediction
from prefix_fast.backends import triton_cost
from prefix_fast.backends.triton_config import TABLE, Device
from prefix_fast.backends.triton_cost import CARDS, Shape

H100 = CARDS["H100"]
GPT2 = Shape(rows=32, heads=12, kv_heads=12, queries=512, keys=512, head_dim=64, element=2, sets=((1, 512),))
LLAMA = Shape(rows=64, heads=32, kv_heads=8, queries=1, keys=64, head_dim=128, element=2, sets=((1, 8192),))


def test_pairs_are_those_that_the_mask_shows():
    for queries, keys in ((5, 5), (3, 9), (9, 4), (1, 7)):
        shape = GPT2._replace(rows=2, queries=queries, keys=keys, sets=((1, 3),))
        visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        assert shape.pairs == 2 * (queries * 3 + int(visible.sum()))
        assert shape._replace(causal=False).pairs == 2 * queries * (3 + keys)


def test_limits_of_gpt2_on_an_h100_are_those_of_the_hand_calculation():
    """B32 T512 P512: 39 µs of matrix products at the peak, 41 µs of exponentials, 60 µs to write and read copies."""
    scores = GPT2.pairs * GPT2.heads
    assert 4 * scores * 64 / H100.half_flops == pytest.approx(39e-6, abs=0.5e-6)
    assert scores / H100.exponentials == pytest.approx(41e-6, abs=0.5e-6)
    assert 2 * triton_cost.concatenated_bytes(GPT2) / H100.memory_bytes == pytest.approx(60e-6, abs=0.5e-6)


def test_forward_takes_the_largest_of_the_four_limits():
    launch, share = triton_cost.LAUNCH, triton_cost.FORWARD_SHARE
    assert triton_cost.forward_seconds(H100, GPT2) == pytest.approx(39.1e-6 / share + launch, rel=0.01)
    quick = H100._replace(half_flops=1e20)
    assert triton_cost.forward_seconds(quick, GPT2) == pytest.approx(
        GPT2.pairs * 12 * 2 * 64 * 2 / 128 / H100.l2_bytes + launch
    )
    quick = quick._replace(l2_bytes=1e20)
    assert triton_cost.forward_seconds(quick, GPT2) == pytest.approx(GPT2.pairs * 12 / H100.exponentials + launch)
    quick = quick._replace(exponentials=1e20)
    moved = 4 * 32 * 12 * 512 * 64 * 2 + 2 * 12 * 512 * 64 * 2  # q, k, v, out of the rows; the prefix once
    assert triton_cost.forward_seconds(quick, GPT2) == pytest.approx(moved / H100.memory_bytes + launch)


def test_concatenation_pays_for_its_copies_and_nothing_else():
    forward, backward = triton_cost.concatenation_seconds(H100, GPT2)
    alone = triton_cost.forward_seconds(H100, GPT2)
    assert forward - alone == pytest.approx(triton_cost.copying_seconds(H100, GPT2))
    assert backward > forward > alone


def test_a_short_prefix_in_one_kernel_saves_two_of_its_seven_products():
    shape = GPT2._replace(sets=((1, 64),))
    separate, fused = (triton_cost.backward_seconds(H100, shape, 128, fused) for fused in (False, True))
    saved = 4 * shape.shared_pairs * 12 * 64 / (triton_cost.BACKWARD_SHARE * H100.half_flops)
    assert separate - fused == pytest.approx(saved + triton_cost.LAUNCH)


def test_decoding_from_a_shared_prefix_beats_one_copy_for_each_row():
    (found,) = (p for p in prediction.predict_decoding(H100) if p.shape == LLAMA)
    keys = 2 * 64 * 8 * (8192 + 64) * 128 * 2
    assert found.cached == pytest.approx(keys / H100.memory_bytes, rel=0.05)
    assert found.path != "one pass"
    assert found.forward < found.cached / 4


@pytest.mark.parametrize("name", CARDS)
def test_every_card_is_predicted_on_every_shape(name):
    card = CARDS[name]
    assert card.architecture in TABLE
    predictions = prediction.predict_training(card) + prediction.predict_decoding(card)
    assert [p.shape for p in predictions] == [*prediction.TRAINING, *prediction.DECODING]
    for p in predictions:
        assert p.forward >= triton_cost.LAUNCH and min(p.concatenation[0], p.ratio) > 0
        flops = 4 * p.shape.pairs * p.shape.heads * p.shape.head_dim
        assert p.forward > flops / card.half_flops


def test_a_card_is_itself_where_a_device_is_asked_for():
    """H200 and H100 have one architecture and as many multiprocessors, and not the same memory."""
    assert triton_cost.card_of(CARDS["H200"]) is CARDS["H200"]
    half = triton_cost.card_of(Device("sm_90", 66))
    assert half.half_flops == H100.half_flops / 2 and half.memory_bytes == H100.memory_bytes


def test_unknown_devices_get_the_least_card_of_their_size():
    assert triton_cost.card_of(Device("sm_75", 72)) == CARDS["A10"]


def test_twice_the_rows_take_no_less_time():
    for shape in (*prediction.TRAINING, *prediction.DECODING):
        more = shape._replace(rows=2 * shape.rows)
        assert triton_cost.forward_seconds(H100, more) >= triton_cost.forward_seconds(H100, shape)
        assert triton_cost.backward_seconds(H100, more) >= triton_cost.backward_seconds(H100, shape)
