"""Which of its row's own tokens a query sees, as the attention interface's mask function says it, without a T × T mask.

transformers builds a mask once per forward from (q_length, kv_length, q_offset, kv_offset, a mask function, the 2-D
padding mask). Own key j stands at position kv_offset + j, query i at q_offset + i. The operator asks for

    key_mask[b, j]                                the padding mask, cut to the cache
    j <= i + query_offset                         query_offset = q_offset - kv_offset
    j > i + query_offset - window                 sliding windows

so causal and sliding masks need nothing of size Tq × Tk. Other patterns (several texts packed in one row, chunked
attention) become an additive bias on the own tokens. Slots of a static cache past the current position lie behind
the causal edge. The prefix is no part of any of this: it is visible to every query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Visible(NamedTuple):
    """The operator's arguments that an `OwnMask` stands for."""

    key_mask: Tensor | None
    attn_bias: Tensor | None
    is_causal: bool
    query_offset: Tensor | int | None
    window: int | None


class OwnMask:
    """One mask request of a model's forward, kept as it came: what it means is worked out where it is used.

    A model that shares its config with a patched one asks for the same object and turns it back into the mask of its
    own attention (`materialised`). `ndim`, `shape`, `to` and `contiguous` are what transformers reads of a 4-D mask.
    """

    ndim = 4

    def __init__(self, request: dict[str, Any]) -> None:
        # A static cache counts its length in place, in the tensor that it hands out.
        if isinstance(request["q_offset"], Tensor):
            request["q_offset"] = request["q_offset"].clone()
        self.request = request
        self._visible: Visible | None = None
        self._materialised: tuple[str, Any] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, 1, Tq, Tk), as of the mask it replaces."""
        return (self.request["batch_size"], 1, self.request["q_length"], self.request["kv_length"])

    def contiguous(self) -> OwnMask:
        """Itself: there is no tensor to copy."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> OwnMask:
        """Itself: the request already stands on the device of the model's inputs."""
        return self

    def materialised(self, implementation: str) -> Any:
        """The mask that the attention `implementation` of transformers would have been given."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        if self._materialised is None or self._materialised[0] != implementation:
            mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.request)
            self._materialised = (implementation, mask)
        return self._materialised[1]

    def visible(self, dtype: torch.dtype, prefix_length: int) -> Visible:
        """The operator's arguments; `prefix_length`: how far before the row's own tokens a window reaches back."""
        if torch.compiler.is_compiling():  # a checkpointed layer must not write to what is outside of it
            return _visible(self.request, dtype, prefix_length)
        if self._visible is None:
            self._visible = _visible(self.request, dtype, prefix_length)
        return self._visible


def make_own_mask(**request: Any) -> OwnMask:
    """The mask function that is registered for our attention."""
    request.setdefault("q_offset", 0)
    request.setdefault("kv_offset", 0)
    given = request.get("attention_mask")
    return given if isinstance(given, OwnMask) else OwnMask(request)


def _visible(request: dict[str, Any], dtype: torch.dtype, prefix_length: int) -> Visible:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    mask_function = request.get("mask_function", causal_mask_function)
    window = None
    if mask_function is not causal_mask_function and mask_function is not bidirectional_mask_function:
        window = plain_window(mask_function, request)
        if window is None:
            allowed = sdpa_mask(**{**request, "allow_is_causal_skip": False})
            bias = torch.zeros((), dtype=dtype, device=allowed.device).masked_fill(~allowed, float("-inf"))
            return Visible(None, bias, False, None, None)
    offset = request["q_offset"] - request["kv_offset"]
    if window is not None and isinstance(offset, int) and offset + request["q_length"] + prefix_length <= window:
        window = None
    return Visible(_key_mask(request), None, mask_function is not bidirectional_mask_function, offset, window)


def _key_mask(request: dict[str, Any]) -> Tensor | None:
    """The 2-D padding mask of the keys that the cache still holds; slots it does not reach yet are False."""
    mask, length, start = request.get("attention_mask"), request["kv_length"], request["kv_offset"]
    if mask is None:
        return None
    if mask.shape[-1] < start + length:
        mask = torch.nn.functional.pad(mask, (0, start + length - mask.shape[-1]))
    mask = mask[:, start : start + length]
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def _closure(function: Callable) -> dict[str, Any]:
    """The variables that a nested function keeps, by name."""
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def plain_window(mask_function: Callable, request: dict[str, Any]) -> int | None:
    """The window of transformers' causal sliding-window mask; None for every other mask function.

    `sliding_window_causal_mask_function(w)` is `and_masks(sliding_window_overlay(w), causal_mask_function)`, a closure
    with no other mark, and packing, chunks and overlays are closures around it.
    """
    from transformers.masking_utils import causal_mask_function

    if request.get("local_size") is None or not hasattr(mask_function, "__code__"):
        return None
    parts = _closure(mask_function).get("mask_functions", ())
    if len(parts) != 2 or parts[1] is not causal_mask_function or not hasattr(parts[0], "__code__"):
        return None
    kept = _closure(parts[0])
    return kept.get("sliding_window") if set(kept) == {"sliding_window"} else None
