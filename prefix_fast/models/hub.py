"""The adapter to transformers' attention interface: our attention function, and the prefix it is handed.

    fn(module, query [B, H, Tq, D], key, value [B, Hkv, Tk, D], mask, **kwargs) -> ([B, Tq, H, D], None)

The prefix comes down the model's forward as one more keyword argument, a `PrefixContext`. A call without it belongs to
a model that is not patched but shares its config with one that is, or to attention that reads no prefix (GPT-2's
cross-attention): it runs the attention implementation that the config had before, which the registered name tells.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefix_fast import selfcheck
from prefix_fast.choice import Choice, States
from prefix_fast.functional import Segment, segment_attention
from prefix_fast.models import sites
from prefix_fast.models.masks import OwnMask, Visible, make_own_mask
from prefix_fast.models.sites import Site

KEYWORD = "prefix_fast"
# config._attn_implementation before → after. The name alone tells what to restore and what an unpatched model runs.
ATTENTION_NAMES = {
    "sdpa": "prefix_fast",
    "eager": "prefix_fast_eager",
    "flash_attention_2": "prefix_fast_fa2",
    "flash_attention_3": "prefix_fast_fa3",
    "flash_attention_4": "prefix_fast_fa4",
    "flex_attention": "prefix_fast_flex",
}
ORIGINAL_NAMES = {name: original for original, name in ATTENTION_NAMES.items()}


class PrefixContext:
    """One forward's prefix: per site, keys and values of each layer, [1, Hkv, P, D] each, views of one stacked tensor.

    Args:
        states: site → the stacked keys and values, [L, 1, Hkv, P, D] each; a site that is not there has no prefix.
        backend: as in `prefix_attention`.
        in_window: the prefix's positions count in a sliding window, and leave it (PEFT's numbers).
        choice: of several prefixes, the one that each row reads; the states are then packed, [L, Hkv, total, D].
        shifts_positions: the own tokens stand after the prefix.
    """

    def __init__(
        self,
        states: States,
        backend: str,
        in_window: bool = False,
        choice: Choice | None = None,
        shifts_positions: bool = True,
    ) -> None:
        self.backend = backend
        self.in_window = in_window
        self.choice = choice
        self.placed = False  # whether the call's positions stand after the prefix
        # By how much the decoder's own tokens stand further on: all rows', or [B, 1].
        self.length: int | Tensor = 0
        if "decoder" in states and shifts_positions:
            self.length = states["decoder"][0].shape[-2] if choice is None else choice.lengths
        # A reparametrised prefix is a view of its MLP's output, whose tokens lie 2 · L · Hkv · D floats apart:
        # every key would miss the TLB.
        self.layers = {site: tuple(stacked.contiguous().unbind(0) for stacked in pair) for site, pair in states.items()}
        self.needs_grad = torch.is_grad_enabled() and any(
            tensor.requires_grad for pair in states.values() for tensor in pair
        )

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: OwnMask | Tensor | None,
        *,
        position_bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer to the prefix and the own tokens: what the interface asks of an attention function."""
        site = sites.site_of(module)
        causal = site.name == "decoder" and getattr(module, "is_causal", True)
        visible = self._visible(query, mask, causal)
        if position_bias is not None and site.name != "cross":  # the cross-attention's is zero, which `admit` has seen
            bias = position_bias.to(query.dtype)
            visible = visible._replace(attn_bias=bias if visible.attn_bias is None else bias + visible.attn_bias)
        segments = self.segments(site, query, key, mask)
        out = segment_attention(
            query,
            key,
            value,
            segments,
            key_mask=visible.key_mask,
            attn_bias=visible.attn_bias,
            is_causal=visible.is_causal,
            query_offset=visible.query_offset,
            window=visible.window,
            backend=self.backend,
            **operator_options(**options),
        )
        return out.transpose(1, 2), None  # type: ignore[union-attr]

    def segments(self, site: Site, query: Tensor, key: Tensor, mask: Any) -> list[Segment]:
        """The prefix as one layer's attention reads it, none or one; raises where it cannot be read from there."""
        if self.needs_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "prefix_fast: expected the layers to run with gradients as the prefix does, got a layer under no_grad,"
                " as reentrant gradient checkpointing runs it, where the prefix would get no gradient; use"
                " use_reentrant=False"
            )
        segments = self._segments(site, query, key, mask)
        if not torch.compiler.is_compiling():  # the model may have come to its device after patch
            prefix_dtype = segments[0].key.dtype if segments else query.dtype
            selfcheck.vet(query.device, self.backend, query.shape[-1], query.dtype, prefix_dtype)
        return segments

    def _segments(self, site: Site, query: Tensor, key: Tensor, mask: Any) -> list[Segment]:
        if site.name not in self.layers:
            return []
        keys, values = (layers[site.layer] for layers in self.layers[site.name])
        length = keys.shape[-2] if self.choice is None else max(self.choice.sizes)
        bias = None
        if site.bias is not None:
            past: Tensor | int = 0
            if site.name == "decoder":
                if mask is not None and not isinstance(mask, OwnMask):
                    raise NotImplementedError(
                        "prefix_fast: expected a padding mask [B, T] in a model with relative positions, got a 4-D one,"
                        " which does not say where the queries stand; pass a 2-D mask"
                    )
                past = key.shape[2] - query.shape[2] if mask is None else mask.request["q_offset"]
            bias = sites.relative_bias(site, query.shape[2], length, past).to(query.dtype)  # type: ignore[union-attr]
        if self.choice is not None:
            return [
                self.choice.segment(keys, values) if bias is None else self.choice.biased_segment(keys, values, bias)
            ]
        return [Segment(keys, values, in_window=self.in_window, bias=bias)]

    def _visible(self, query: Tensor, mask: OwnMask | Tensor | None, causal: bool) -> Visible:
        if isinstance(mask, OwnMask):
            visible = mask.visible(query.dtype, self.length if self.in_window else 0)  # type: ignore[arg-type]  # no bank there
            if self.in_window and visible.attn_bias is not None and mask.request.get("local_size") is not None:
                raise NotImplementedError(
                    "prefix_fast: expected full or sliding-window attention, got a local pattern (chunks, or packed"
                    " texts in a window) in a PeftModel, where PEFT counts the prefix's positions; unpatch the model"
                )
            return visible
        if mask is None:
            return Visible(None, None, causal, None, None)
        if mask.dtype == torch.bool:
            mask = torch.zeros((), dtype=query.dtype, device=mask.device).masked_fill(~mask, float("-inf"))
        return Visible(None, mask.to(query.dtype), False, None, None)


def operator_options(
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> dict[str, Any]:
    """The operator's arguments of what the interface hands to every attention function."""
    return {"dropout_p": dropout, "scale": scaling, "softcap": softcap, "sinks": s_aux}


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that is registered with transformers."""
    context = kwargs.pop(KEYWORD, None)
    if context is not None:
        return context.attend(module, query, key, value, attention_mask, **kwargs)
    original = ORIGINAL_NAMES[module.config._attn_implementation]
    if isinstance(attention_mask, OwnMask):
        attention_mask = attention_mask.materialised(original)
    return _original_function(module, original)(module, query, key, value, attention_mask, **kwargs)


def _original_function(module: Any, original: str) -> Callable:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    default = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(original, default)
    if function is None:
        raise NotImplementedError(
            f"prefix_fast: expected {type(module).__module__} to define eager_attention_forward, which a model that"
            " shares its config with a patched model runs; give the models separate configs"
        )
    return function


def register() -> None:
    """Make the names known to transformers. Does nothing the second time."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in ORIGINAL_NAMES:
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, make_own_mask)


def original_attention(config: Any) -> str:
    """The attention implementation that the config has, or had before a model that uses it was patched."""
    name = config._attn_implementation or "sdpa"
    return ORIGINAL_NAMES.get(name, name)


def enter_attention(model: Any) -> None:
    """Point the model's config at our attention function.

    Raises:
        NotImplementedError: the model's attention does not go through the interface.
    """
    register()
    original = original_attention(model.config)
    name = ATTENTION_NAMES.get(original)
    where = (
        "patch: expected a model whose attention goes through transformers' attention interface, got"
        f" {type(model).__name__}"
    )
    if name is None:
        raise NotImplementedError(
            f"{where} with attn_implementation={original!r}; load it with one of {sorted(ATTENTION_NAMES)}"
        )
    if not model._can_set_attn_implementation():
        raise NotImplementedError(f"{where}, which computes attention in its own modules; it cannot be patched")
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise NotImplementedError(f"{where}, which does not take another implementation; it cannot be patched")


def leave_attention(model: Any) -> None:
    """Give the model's config back the implementation that `enter_attention` replaced."""
    original = original_attention(model.config)
    # T5's stacks have configs of their own.
    parts = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
    if any(part.config._attn_implementation != original for part in parts):
        model.set_attn_implementation(original)
