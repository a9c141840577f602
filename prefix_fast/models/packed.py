"""Attention of rows whose tokens stand one after another, without padding, and batches that come so or are made so.

    tokens      [1, total]   row after row; linear layers, norms and positions work token by token and see no rows
    attention                of packed rows: queries and keys are cut by offsets (see `segment_attention`)

Of a padded batch the positions that are attended to are computed, row after row, and behind them those that only
predict a label (with left padding, the first label is predicted by padding): rows without own keys, which see the
prefix alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prefix_fast.functional import Segment, segment_attention
from prefix_fast.models import hub, sites
from prefix_fast.models.masks import OwnMask, plain_window

# Arguments of a call with a value for each token, and others under which its tokens may be packed.
_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")
_OTHERS = {"attention_mask", "use_cache", "output_attentions", hub.KEYWORD}
# What transformers' DataCollatorWithFlattening says of its rows, beside their positions.
_OFFSETS, _LENGTH = "cu_seq_lens_q", "max_length_q"
_FLATTENED = {_OFFSETS, "cu_seq_lens_k", _LENGTH, "max_length_k", "seq_idx"}
_LEAST_REST = 1 / 16  # of the tokens: leaving fewer out of the last layer saves no time
_MIXERS = (nn.Conv1d, nn.RNNBase)  # modules in which tokens see others without attention


class CannotPackError(NotImplementedError):
    """A layer's attention would not be the same among packed rows."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Packed rows, as a layer's attention reads them.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: [rows + 1] offsets of the rows' queries and keys.
        keys: how many tokens are keys, the first ones.
        longest: at least the tokens of the longest row.
        reach: at least the tokens from a row's first key, the prefix aside, to its last query.
        in_windows: whether a window over own keys is the same as in padded rows.
        query_offset: [rows] the place of a row's first query among its keys; None: its queries are the last.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    keys: int
    longest: int
    reach: int
    in_windows: bool = True
    query_offset: Tensor | None = None

    def segments(self, key: Tensor, value: Tensor) -> list[Segment]:
        """What rows read between the prefix and their own keys, from this layer's keys and values [keys, Hkv, D]."""
        return []


class PackedContext:
    """In the place of the `PrefixContext`, whose prefix every row reads first."""

    placed = True

    def __init__(self, prefix: hub.PrefixContext, rows: Rows, kept: dict[int, tuple[Tensor, Tensor]] | None = None):
        self.prefix = prefix
        self.rows = rows
        self.kept = kept  # where each layer's keys and values go, if anywhere

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        *,
        position_bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer, of packed rows [1, H, total, D].

        Raises:
            CannotPackError: the layer's tokens see others than all of their row before them, or its last ones.
        """
        rows = self.rows
        window = self._window(module, mask, position_bias)
        segments = self.prefix.segments(sites.site_of(module), query, key, mask)
        if self.kept is not None:
            self.kept[module.layer_idx] = (key, value)
        # Views whose backward is one: a selected or cut tensor's fills zeros and copies.
        query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        if len(key) > rows.keys:
            key, value = key[: rows.keys], value[: rows.keys]
        out = segment_attention(
            query,
            key,
            value,
            [*segments, *rows.segments(key, value)],
            cu_seqlens_q=rows.cu_seqlens_q,
            cu_seqlens_k=rows.cu_seqlens_k,
            max_seqlen_q=rows.longest,
            max_seqlen_k=rows.longest,
            query_offset=rows.query_offset,
            window=window,
            backend=self.prefix.backend,
            **hub.operator_options(**options),
        )
        return out.unsqueeze(0), None  # type: ignore[union-attr]

    def _window(self, module: Any, mask: Any, position_bias: Tensor | None) -> int | None:
        """The window of a layer in which every token sees all of its row before it, or its last ones."""
        from transformers.masking_utils import causal_mask_function

        name, request = type(module).__name__, mask.request if isinstance(mask, OwnMask) else {}
        function, local = request.get("mask_function", causal_mask_function), request.get("local_size")
        if local is not None:
            reach = self.rows.reach + (int(self.prefix.length) if self.prefix.in_window else 0)
            if reach <= local:
                return None
            if self.rows.in_windows and not self.prefix.in_window and plain_window(function, request) == local:
                return local
            raise CannotPackError(
                f"packed rows: expected rows (source and target) within the {local} tokens that {name} looks back, got"
                f" one of up to {reach}; pass them as ordinary rows"
            )
        causal = function is causal_mask_function and getattr(module, "is_causal", True)
        if not causal or position_bias is not None or not (mask is None or isinstance(mask, OwnMask)):
            raise CannotPackError(
                f"packed rows: expected causal attention, got {name}, in which a token sees others than those before"
                " it; pass ordinary rows"
            )
        return None


def flattened(arguments: dict[str, Any], explicit: bool) -> dict[str, Any]:
    """The arguments of a call whose one row is several texts, with a context that keeps them apart; else as they are.

    Texts begin where the offsets say or, without them and a padding mask, where positions go back to the first one;
    positions with other jumps are one text's. Positions are read from a GPU, offsets never.

    Args:
        arguments: the call's, by name, with its positions and context.
        explicit: whether the caller gave the positions; others are one text's.

    Raises:
        ValueError: offsets that do not end with the row's tokens (looked at on the CPU).
    """
    positions = arguments["position_ids"]
    offsets, longest = arguments.get(_OFFSETS), arguments.get(_LENGTH)
    rows, tokens = _inputs(arguments).shape[:2]
    if torch.compiler.is_compiling() or rows != 1 or arguments.get("past_key_values") is not None:
        return arguments
    if offsets is None:
        if not explicit or arguments.get("attention_mask") is not None:
            return arguments
        starts = (positions[0].diff() != 1).nonzero()[:, 0] + 1
        if not starts.numel() or (positions[0][starts] != positions[0, 0]).any():
            return arguments
        offsets = torch.nn.functional.pad(starts, (1, 1))
        offsets[-1] = tokens
    if offsets.device.type == "cpu" and int(offsets[-1]) != tokens:
        raise ValueError(
            f"{_OFFSETS}: expected offsets up to the row's {tokens} tokens, got {int(offsets[-1])}; leave them out"
            " where position_ids say where texts begin"
        )
    offsets, longest = offsets.int(), tokens if longest is None else int(longest)
    texts = Rows(cu_seqlens_q=offsets, cu_seqlens_k=offsets, keys=tokens, longest=longest, reach=longest)
    return {
        **{name: value for name, value in arguments.items() if name not in _FLATTENED},
        "attention_mask": torch.ones_like(positions),  # or transformers would ask for a mask of tokens × tokens
        hub.KEYWORD: PackedContext(_for_rows(arguments[hub.KEYWORD], torch.zeros_like(offsets[1:])), texts),
    }


@dataclass(frozen=True)
class LastTokens:
    """The tokens between a row's first and its last predicted label: the last layer computes no others.

    Attributes:
        needed, rest: their places among the packed tokens, and those of the others, in order.
        order: [total] the place of each packed token in `needed` followed by `rest`.
        rows: of the needed tokens as queries, and all tokens as keys.
    """

    needed: Tensor
    rest: Tensor
    order: Tensor
    rows: Rows

    def joined(self, needed: Tensor, rest: Tensor) -> Tensor:
        """[1, Hkv, ..., D] of both, in the order of the packed tokens."""
        tokens = torch.cat([needed.squeeze(0).transpose(0, 1), rest.squeeze(0).transpose(0, 1)])
        return tokens.index_select(0, self.order).transpose(0, 1).unsqueeze(0)

    def spread(self, states: Any) -> Any:
        """[1, needed, ...] → [1, total, ...], with zeros for the rest; anything else as it is."""
        if not isinstance(states, Tensor) or states.shape[:2] != (1, len(self.needed)):
            return states
        whole = states.new_zeros((1, len(self.order), *states.shape[2:]))
        return whole.index_copy(1, self.needed, states)


@dataclass(frozen=True, kw_only=True)
class PaddedRows(Rows):
    """The positions of a padded batch [B, T] that are computed.

    Attributes:
        index: [total] those positions of the batch, in one row.
        shape: (B, T).
        last: the tokens that the last layer has to compute; None: all of them.
    """

    index: Tensor
    shape: tuple[int, int]
    last: LastTokens | None = None

    def pack(self, values: Tensor) -> Tensor:
        """[B, T, ...] → [1, total, ...]; [1, T, ...] stands for the same in every row."""
        values = values.expand(self.shape[0], *values.shape[1:])
        return values.flatten(0, 1)[self.index].unsqueeze(0)

    def unpack(self, values: Tensor) -> Tensor:
        """[1, total, ...] → [B, T, ...], with zeros where nothing was computed."""
        whole = values.new_zeros((self.shape[0] * self.shape[1], *values.shape[2:]))
        return whole.index_copy(0, self.index, values[0]).unflatten(0, self.shape)


def padding_free(model: Any, arguments: dict[str, Any], targets: Tensor, ignored: int, trim: bool) -> PaddedRows | None:
    """The positions that a training call has to compute; None: all of them, or they cannot be told apart.

    A GPU is waited for.

    Args:
        model: the patched model. arguments: the call's, by name, without those of the loss.
        targets: [B, T] the label that each position predicts, or `ignored`.
        trim: also leave out what the last layer does not have to compute.
    """
    inputs, mask = _inputs(arguments), arguments.get("attention_mask")
    given = {name for name, value in arguments.items() if value is not None}
    if torch.compiler.is_compiling() or inputs.shape[:2] != targets.shape or not given <= _OTHERS.union(_PER_TOKEN):
        return None
    if mask is None:
        mask = torch.ones_like(targets)
    if not isinstance(mask, Tensor) or mask.shape != targets.shape or not can_pack(model):
        return None
    attended, predicts = mask.bool(), targets != ignored
    alone = predicts & ~attended
    # Within a row, everything attended to must be one run, with what only predicts before it.
    seen = attended.cumsum(1)
    misplaced = (alone & (seen > 0)) | (~attended & (seen > 0) & (seen < seen[:, -1:]))
    keys, alone_tokens, wrong = torch.stack([attended.sum(), alone.sum(), misplaced.sum()]).tolist()
    if wrong:
        return None
    parts = [attended, alone] if alone_tokens else [attended]
    index = torch.cat([part.flatten().nonzero()[:, 0] for part in parts])
    key_offsets = offsets_of([attended, torch.zeros_like(alone)][: len(parts)])
    batch, tokens = targets.shape
    rows = PaddedRows(
        cu_seqlens_q=offsets_of(parts), cu_seqlens_k=key_offsets, keys=keys, longest=tokens, reach=tokens,
        index=index, shape=(batch, tokens),
    )  # fmt: skip
    last = _last_tokens(rows, attended, predicts & attended, alone) if trim else None
    if last is None and len(index) == targets.numel():
        return None
    return replace(rows, last=last)


def _last_tokens(rows: PaddedRows, attended: Tensor, predicts: Tensor, alone: Tensor) -> LastTokens | None:
    """What the last layer computes, given masks [B, T]; None: nearly everything, or no label."""
    begun = predicts.cumsum(1)
    between = attended & (begun > 0) & ((begun < begun[:, -1:]) | predicts)
    chosen = (between | alone).flatten()[rows.index]
    needed, rest = chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
    if not len(needed) or len(rest) < _LEAST_REST * len(chosen):
        return None
    places = torch.cat([needed, rest])
    order = torch.empty_like(places).scatter_(0, places, torch.arange(len(places), device=places.device))
    count = len(rows.cu_seqlens_k) - 1  # twice the batch's rows where some tokens only predict
    queries = offsets_of([between, alone][: count // len(between)])
    first = torch.nn.functional.pad((attended & (begun == 0)).sum(1), (0, count - len(between)))
    of_queries = Rows(
        cu_seqlens_q=queries, cu_seqlens_k=rows.cu_seqlens_k, keys=rows.keys, longest=rows.longest, reach=rows.reach,
        query_offset=first,
    )  # fmt: skip
    return LastTokens(needed, rest, order, of_queries)


def packed_arguments(
    arguments: dict[str, Any], rows: PaddedRows, kept: dict[int, tuple[Tensor, Tensor]] | None
) -> dict[str, Any]:
    """The arguments of the call on packed rows: tokens and what is given for each, and the context.

    Args:
        kept: where each layer's keys and values [1, Hkv, total, D] go, in the place of a cache.
    """
    packed = dict(arguments)
    for name in _PER_TOKEN:
        if packed.get(name) is not None:
            packed[name] = rows.pack(packed[name])
    packed["attention_mask"] = torch.ones_like(packed["position_ids"])  # or restarting positions mean several texts
    batch = rows.shape[0]
    readers = torch.arange(rows.cu_seqlens_q.numel() - 1, device=rows.index.device) % batch
    packed[hub.KEYWORD] = PackedContext(_for_rows(packed[hub.KEYWORD], readers), rows, kept)
    packed["use_cache"] = False
    return packed


def wants_cache(model: Any, arguments: dict[str, Any]) -> bool:
    """Whether the call, as of the class, would return a cache."""
    asked = arguments.get("use_cache")
    asked = getattr(model.config, "use_cache", True) if asked is None else asked
    return bool(asked) and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def unpacked_cache(config: Any, kept: dict[int, tuple[Tensor, Tensor]], rows: PaddedRows) -> Any:
    """The cache of the padded batch, of the keys and values that a forward on packed rows has kept."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    for layer, states in sorted(kept.items()):
        key, value = (rows.unpack(part.transpose(1, 2)).transpose(1, 2) for part in states)
        cache.update(key, value, layer)
    return cache


def can_pack(model: Any) -> bool:
    """Whether the model's tokens meet in attention alone, each counts once, and what it returns can be unpacked."""
    config = model.config
    if getattr(config, "output_router_logits", False) or getattr(config, "output_hidden_states", False):
        return False
    return not any(isinstance(module, _MIXERS) for module in model.modules())


def _inputs(arguments: dict[str, Any]) -> Tensor:
    ids = arguments.get("input_ids")
    return arguments["inputs_embeds"] if ids is None else ids


def _for_rows(context: hub.PrefixContext, rows: Tensor) -> hub.PrefixContext:
    """The context of packed rows, of which each reads the prefix of the row of the batch that it is part of."""
    if context.choice is None:
        return context
    context = copy.copy(context)
    context.choice = context.choice.picked(rows)  # type: ignore[union-attr]
    return context


def offsets_of(masks: list[Tensor]) -> Tensor:
    """[rows + 1] of the tokens in the rows of several masks [B, T]."""
    return torch.nn.functional.pad(torch.cat([mask.sum(1) for mask in masks]).cumsum(0), (1, 0)).int()
