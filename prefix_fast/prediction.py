"""Times that the cost model predicts for a graphics card, on the shapes that are benchmarked where there is one.

Every figure is a prediction from a roofline: nothing is measured, and no card has to be there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from prefix_fast.backends import triton_cost
from prefix_fast.backends.triton_config import Device, tiles_for
from prefix_fast.backends.triton_cost import CARDS, Card, Shape

HEADS = ((12, 12, 64), (32, 8, 128))  # H, Hkv, D: GPT-2's, and those of an 8B Llama
LENGTHS = (10, 64, 200, 512, 1024, 4096, 8192)
ROWS_AND_TOKENS = {(12, 12, 64): ((32, 512), (8, 128)), (32, 8, 128): ((8, 1024), (4, 2048))}
DECODES = ((64, 1, 64, 1024), (64, 1, 64, 8192), (256, 1, 64, 8192), (1, 1, 64, 8192), (32, 4, 128, 4096))  # B Tq Tk P


def _shape(B: int, heads: tuple[int, int, int], Tq: int, Tk: int, P: int) -> Shape:
    H, Hkv, D = heads
    return Shape(B, H, Hkv, Tq, Tk, D, 2, ((1, P),))


TRAINING = tuple(_shape(B, h, T, T, P) for h in HEADS for B, T in ROWS_AND_TOKENS[h] for P in LENGTHS)
DECODING = tuple(_shape(B, h, Tq, Tk, P) for h in HEADS for B, Tq, Tk, P in DECODES)

ASSUMPTIONS = (
    f"Rates are data sheets'; kernels and rivals alike are taken to reach {triton_cost.FORWARD_SHARE:.1%} (forward) "
    f"and {triton_cost.BACKWARD_SHARE:.0%} (backward) of the peak of matrix products, the full rate of exponentials, "
    f"L2 and memory, and {1e6 * triton_cost.LAUNCH:.0f} µs a launch."
)


class Prediction(NamedTuple):
    """Seconds of one call and of its rivals; what a call does not do takes 0."""

    shape: Shape
    path: str  # training: of the prefix's backward; decoding: one pass, or chunks of the prefix + of the own tokens
    forward: float
    backward: float
    concatenation: tuple[float, float]  # forward, backward
    cached: float  # SDPA over a cache that holds a copy for every row; 0 in training

    @property
    def ratio(self) -> float:
        """How many times longer concatenation takes, forward and backward together."""
        return sum(self.concatenation) / (self.forward + self.backward)


def label(shape: Shape) -> str:
    """The shape as tables show it."""
    kv_heads = f"/{shape.kv_heads}" if shape.kv_heads != shape.heads else ""
    tokens = f"T{shape.keys}" if shape.queries == shape.keys else f"Tq{shape.queries} Tk{shape.keys}"
    prefix = " ".join(f"P{size}" for _, size in shape.sets)
    return f"B{shape.rows} H{shape.heads}{kv_heads} D{shape.head_dim} {tokens} {prefix}"


def card_named(name: str) -> tuple[str, Card]:
    """A card of the table, by its name in any case.

    Raises:
        ValueError: there is none of that name.
    """
    for known, card in CARDS.items():
        if known.lower() == name.lower():
            return known, card
    raise ValueError(f"bench: expected --predict to be one of {', '.join(CARDS)}, got {name!r}; choose one, or list")


def predict_training(card: Card) -> list[Prediction]:
    """One prediction for each of TRAINING, forward and backward in bfloat16."""
    device = Device(card.architecture, card.multiprocessors)
    predictions = []
    for shape in TRAINING:
        tiles = tiles_for(device, shape.head_dim, torch.bfloat16)
        fused = triton_cost.fuses_short_prefix(device, shape, tiles.short)
        path = "fused" if fused else "dq, dkv"
        forward = triton_cost.forward_seconds(card, shape, tiles.forward.queries)
        backward = triton_cost.backward_seconds(card, shape, tiles.dq.queries, fused)
        rival = triton_cost.concatenation_seconds(card, shape)
        predictions.append(Prediction(shape, path, forward, backward, rival, 0.0))
    return predictions


def predict_decoding(card: Card) -> list[Prediction]:
    """One prediction for each of DECODING, forward in bfloat16."""
    device = Device(card.architecture, card.multiprocessors)
    predictions = []
    for shape in DECODING:
        tiles = tiles_for(device, shape.head_dim, torch.bfloat16)
        split = triton_cost.key_chunks(card, shape, tiles.split, tiles.few)
        if split is None:
            path, forward = "one pass", triton_cost.one_pass_seconds(card, shape, tiles.few)
        else:
            path = "+".join(map(str, split.chunks))
            forward = triton_cost.split_seconds(card, shape, split)
        cached = triton_cost.cached_seconds(card, shape)
        rival = (triton_cost.copying_seconds(card, shape) + cached, 0.0)
        predictions.append(Prediction(shape, path, forward, 0.0, rival, cached))
    return predictions


def microseconds(seconds: float) -> str:
    """As tables show it."""
    return f"{1e6 * seconds:.0f}"
