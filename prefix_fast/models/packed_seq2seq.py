"""A padded batch of an encoder-decoder without its padding: one row of packed source tokens, one of target tokens.

    sources [1, total_s]   encoder attention     row b reads its prefix · all of source b
    targets [1, total_t]   decoder attention     row b reads its prefix · its own tokens up to the query
                           cross-attention       row b reads its prefix · all of source b

Of the sources every position that is attended to is computed, in whatever pattern. Of the targets, what
`decoder_attention_mask` hides is left out or, without one, the padding at a row's end: nothing reads it, since decoder
attention is causal. Position embeddings are told where each token stood in its row, and the class's forward runs as it
is. Where rows share sources, cross-attention reads them as a segment: row b the source reads[b].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefix_fast.backends.problem import Plan, make_plan
from prefix_fast.functional import Segment, segment_attention
from prefix_fast.models import hub, sites
from prefix_fast.models.masks import OwnMask
from prefix_fast.models.outputs import Deferred
from prefix_fast.models.packed import CannotPackError, PaddedRows, can_pack, offsets_of, unpacked_cache, wants_cache
from prefix_fast.sources import IGNORED

Kept = dict[str, dict[int, tuple[Tensor, Tensor]]]  # of the decoder's sites: each layer's keys and values
# Arguments of a call with a value for each token, as ids or embeddings, and others under which tokens may be packed.
_SOURCES = ("input_ids", "inputs_embeds")
_TARGETS = ("decoder_input_ids", "decoder_inputs_embeds")
_OTHERS = {"labels", "attention_mask", "decoder_attention_mask", "use_cache", "num_items_in_batch", hub.KEYWORD}
_SAID = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}  # what a call does anyway


@dataclass(frozen=True)
class Shared:
    """How B targets share N sources.

    Attributes:
        reads: [B] the source that each target reads.
        plan: of `reads`, where the kernels take one.
        prefix: the prefix of the sources.
    """

    reads: Tensor
    plan: Plan | None
    prefix: hub.PrefixContext


@dataclass(frozen=True)
class PackedPairs:
    """The positions of a padded batch that are computed.

    Attributes:
        source, target: those of sources [B, S] and of targets [B, T].
        caches: whether the call returns a cache, of the padded batch.
        shared: None: each target has a source of its own.
    """

    source: PaddedRows
    target: PaddedRows
    caches: bool = False
    shared: Shared | None = None

    def forward(self, own_forward: Callable, model: Any, **arguments: Any) -> Any:
        """The class's forward on packed rows; the encoder's last states come back as [B, S, hidden], a cache deferred.

        Args:
            own_forward: the class's. model: the patched model.
            arguments: those of the padded batch, by name, but labels as `own_forward` is to be given them.

        Raises:
            CannotPackError: attention or positions would not be the same among packed rows.
        """
        given, context = dict(arguments), arguments[hub.KEYWORD]
        for names, rows in ((_SOURCES, self.source), (_TARGETS, self.target)):
            for name in names:
                if given.get(name) is not None:
                    given[name] = rows.pack(given[name])
        given |= {"attention_mask": None, "decoder_attention_mask": None, "use_cache": False}
        kept: Kept = {"decoder": {}, "cross": {}}
        given[hub.KEYWORD] = PairsContext(context, self, kept if self.caches else {})
        source, target = (
            torch.arange(rows.shape[1], device=rows.index.device).unsqueeze(0) for rows in (self.source, self.target)
        )
        positions = self.source.pack(source), self.target.pack(target + context.length)
        with sites.placed(model, *positions) as places:
            output = own_forward(model, **given)
        if not all(place.read for place in places):
            raise CannotPackError(
                f"packed rows: expected encoder and decoder to call embed_positions, got {type(model).__name__}, whose"
                " positions are counted elsewhere; pass padding_free=False to patch"
            )
        if "encoder_last_hidden_state" in output:
            output["encoder_last_hidden_state"] = self.source.unpack(output["encoder_last_hidden_state"])
        if self.caches:
            output["past_key_values"] = Deferred(functools.partial(self._cache, model.config, kept))
        return output

    def _cache(self, config: Any, kept: Kept) -> Any:
        """The cache of the padded batch."""
        from transformers import EncoderDecoderCache

        rows = {"decoder": self.target, "cross": self.source}
        return EncoderDecoderCache(*(unpacked_cache(config, kept[site], rows[site]) for site in rows))


class PairsContext:
    """In the place of the `PrefixContext`, whose prefix every row reads first."""

    placed = True

    def __init__(self, prefix: hub.PrefixContext, pairs: PackedPairs, kept: Kept) -> None:
        self.prefix = prefix
        self.pairs = pairs
        self.kept = kept

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
            CannotPackError: the layer's tokens see others than its site's do.
        """
        site = sites.site_of(module)
        queries = self.pairs.source if site.name == "encoder" else self.pairs.target
        keys = self.pairs.target if site.name == "decoder" else self.pairs.source
        seen = _is_plain(module, site.name, mask) and position_bias is None
        if not seen or (query.shape[2], key.shape[2]) != (queries.keys, keys.keys):
            raise CannotPackError(
                "packed rows: expected attention to all of the source and causal attention among targets, got"
                f" {type(module).__name__}, in which a token sees others; pass padding_free=False to patch"
            )
        shared = self.pairs.shared
        prefix = self.prefix if shared is None or site.name != "encoder" else shared.prefix
        segments, offsets = prefix.segments(site, query, key, mask), keys.cu_seqlens_k
        if site.name in self.kept:
            self.kept[site.name][site.layer] = (key, value)
        # Views whose backward is one: a selected tensor's fills zeros and copies.
        query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        if shared is not None and site.name == "cross":
            segments = [*segments, Segment(key, value, ids=shared.reads, cu_seqlens=offsets, plan=shared.plan)]
            key, value, offsets = key[:0], value[:0], torch.zeros_like(queries.cu_seqlens_q)
        out = segment_attention(
            query,
            key,
            value,
            segments,
            cu_seqlens_q=queries.cu_seqlens_q,
            cu_seqlens_k=offsets,
            max_seqlen_q=queries.longest,
            max_seqlen_k=keys.longest,
            is_causal=site.name == "decoder",
            backend=self.prefix.backend,
            **hub.operator_options(**options),
        )
        return out.unsqueeze(0), None  # type: ignore[union-attr]


def _is_plain(module: Any, site: str, mask: Any) -> bool:
    """Whether a token sees all of its row, in the decoder all before it, and no mask says otherwise."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if site == "decoder" and not getattr(module, "is_causal", True):
        return False
    if mask is None:
        return True
    expected = causal_mask_function if site == "decoder" else bidirectional_mask_function
    request = mask.request if isinstance(mask, OwnMask) else {}
    return request.get("mask_function") is expected and request.get("local_size") is None


def padding_free(
    model: Any, style: str, arguments: dict[str, Any], shifted: bool, may_cache: bool
) -> PackedPairs | None:
    """The positions that a training call has to compute; None: all of them, or they cannot be told apart.

    A GPU is waited for.

    Args:
        model: the patched model. style: how it counts positions (see `families`).
        arguments: the call's, by name, with labels [B, T].
        shifted: whether the decoder's input was made of the labels, shifted by one.
        may_cache: whether the class returns a cache beside a loss, where the call is not told otherwise.
    """
    if not _is_understood(arguments) or not sites.takes_places(model, style) or not can_pack(model):
        return None
    labels = arguments["labels"]
    source = _attended(arguments, _SOURCES, "attention_mask")
    target = _attended(arguments, _TARGETS, "decoder_attention_mask")
    if source is None or target is None or target.shape != labels.shape or len(source) != len(labels):
        return None
    if {source.device, target.device} != {labels.device}:
        return None
    predicts = labels != IGNORED
    if arguments.get("decoder_attention_mask") is None:
        target = ~_padded_end(_padding(model, arguments, shifted) & ~predicts)
    counts = torch.stack([source.sum(), target.sum(), predicts.any().long(), (predicts & ~target).sum()]).tolist()
    sources, targets, labelled, misplaced = counts
    if not sources or not labelled or misplaced or (sources, targets) == (source.numel(), target.numel()):
        return None
    return PackedPairs(_rows(source), _rows(target), may_cache and wants_cache(model, arguments))


def shared_pairs(
    model: Any, style: str, source_mask: Tensor, target_mask: Tensor, reads: Tensor, prefix: hub.PrefixContext
) -> PackedPairs | None:
    """Sources [N, S] and the targets [B, T] that share them; None: the model cannot be told where tokens stand.

    Args:
        model, style: as in `padding_free`. source_mask, target_mask: True: a token.
        reads, prefix: as in `Shared`.
    """
    if torch.compiler.is_compiling() or not sites.takes_places(model, style) or not can_pack(model):
        return None
    plan = None if reads.device.type == "cpu" else make_plan(reads, source_mask.shape[0])
    return PackedPairs(_rows(source_mask), _rows(target_mask), shared=Shared(reads, plan, prefix))


def _is_understood(arguments: dict[str, Any]) -> bool:
    """Whether nothing is given that packed rows have no place for."""
    given = {name for name, value in arguments.items() if value is not None and _SAID.get(name) is not value}
    one_each = all(len(given.intersection(names)) == 1 for names in (_SOURCES, _TARGETS))
    return one_each and given <= _OTHERS.union(_SOURCES, _TARGETS) and not torch.compiler.is_compiling()


def _attended(arguments: dict[str, Any], names: tuple[str, str], mask_name: str) -> Tensor | None:
    """[B, T], True: a token that others may see. None: tokens or mask have another form."""
    ids, mask = arguments.get(names[0]), arguments.get(mask_name)
    inputs: Tensor = arguments[names[1]] if ids is None else ids
    if inputs.dim() != (3 if ids is None else 2):
        return None
    if mask is None:
        return inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == inputs.shape[:2] else None


def _padding(model: Any, arguments: dict[str, Any], shifted: bool) -> Tensor:
    """[B, T], True: padding in the decoder's input, which no mask tells apart. A row's first token never is."""
    labels, ids, padding = arguments["labels"], arguments.get("decoder_input_ids"), model.config.pad_token_id
    if ids is None or padding is None:
        return torch.zeros_like(labels, dtype=torch.bool)
    found = ids[:, 1:] == padding
    if shifted:  # a label may be that token
        found = found & (labels[:, :-1] == IGNORED)
    return torch.nn.functional.pad(found, (1, 0))


def _padded_end(padding: Tensor) -> Tensor:
    """[B, T], True: padding with nothing but padding behind it."""
    return padding.flip(1).cumprod(1).flip(1).bool()


def _rows(computed: Tensor) -> PaddedRows:
    """The packed rows of the positions [B, T] that are computed."""
    index, offsets, (batch, tokens) = computed.flatten().nonzero()[:, 0], offsets_of([computed]), computed.shape
    return PaddedRows(
        cu_seqlens_q=offsets, cu_seqlens_k=offsets, keys=len(index), longest=tokens, reach=tokens, index=index,
        shape=(batch, tokens),
    )  # fmt: skip
