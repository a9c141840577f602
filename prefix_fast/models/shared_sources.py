"""The forward of a batch whose rows share sources (see `prefix_fast.sources`): each source is computed once.

N sources and B targets stand one after another in one row of packed tokens, without padding. In every layer

    source n reads   its prefix · its own tokens up to the query
    target b reads   its prefix · all of source source_index[b] · its own tokens up to the query

where the source is a segment whose keys and values are this layer's own activations: gradients flow back through them,
summed over the rows of the group by the operator. The sources' last hidden states predict their rows' first tokens.
An encoder-decoder encodes each source once; where it can be told where tokens stand, cross-attention reads the sources
as such a segment, and no padding is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from prefix_fast.backends.problem import Plan, make_plan
from prefix_fast.functional import Segment
from prefix_fast.models import families, hub, packed, packed_seq2seq
from prefix_fast.models.loss import LOSS_ARGUMENTS, LossPlan, loss_of_states
from prefix_fast.models.seq2seq_loss import Seq2SeqPlan
from prefix_fast.sources import IGNORED

_ROWS = 1024  # whose logits are kept at a time, for log-probabilities
_TENSORS = ("source_ids", "source_mask", "target_ids", "target_mask", "source_index")
PER_TOKEN = "per_token_logps"
KEYWORDS = (*_TENSORS, PER_TOKEN)
# What else a call may bring; Trainer passes use_cache and return_dict.
_OTHERS = {"labels", "prefix_ids", "use_cache", "return_dict", "num_items_in_batch", "ignore_index"}


@dataclass
class SharedSourceOutput(ModelOutput):
    """What a call with shared sources gives.

    Attributes:
        loss: over the labelled target tokens, as transformers' of the ordinary batch; None without labels.
        per_token_logps: [target tokens] log-probability of each, row after row; None unless asked for.
    """

    loss: Tensor | None = None
    per_token_logps: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SharedRows(packed.Rows):
    """N sources and then B targets.

    Attributes:
        ids, positions: [total] tokens, and their positions without a prefix.
        sources, source_tokens: N, and the tokens of all sources.
        reads: [N + B] the source that each of them reads before its own tokens, -1 for the sources.
        plan: of `reads`, where the kernels take one.
        row_of_token: [total] in [0, N + B).
        predictors: [target tokens] the packed token whose hidden state predicts it.
    """

    ids: Tensor
    positions: Tensor
    sources: int
    source_tokens: int
    reads: Tensor
    plan: Plan | None
    row_of_token: Tensor
    predictors: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> SharedRows:
        """The packed rows of a batch. Reads the number of tokens, on a GPU too."""
        source_mask, target_mask = batch["source_mask"].bool(), batch["target_mask"].bool()
        index = batch["source_index"].long()
        (sources, source_width), (targets, target_width) = source_mask.shape, target_mask.shape
        source_ids = batch["source_ids"][source_mask]
        source_tokens = source_ids.shape[0]
        ids = torch.cat([source_ids, batch["target_ids"][target_mask]])
        lengths = torch.cat([source_mask.sum(1), target_mask.sum(1)])
        ends = lengths.cumsum(0)
        own_rows = torch.arange(sources + targets, device=ids.device)
        rows = torch.repeat_interleave(own_rows, lengths, output_size=ids.shape[0])
        steps = torch.arange(ids.shape[0], device=ids.device)
        # Where a row's first token stands, and the packed token before it: a source's last one.
        first = torch.cat([torch.zeros_like(lengths[:sources]), lengths[index]])
        before = torch.cat([torch.zeros_like(ends[:sources]), ends[index] - 1])
        within = steps - (ends - lengths)[rows]
        reads = torch.cat([torch.full_like(index[:1], -1).expand(sources), index])
        offsets = torch.nn.functional.pad(ends, (1, 0)).int()
        return cls(
            cu_seqlens_q=offsets, cu_seqlens_k=offsets, keys=ids.shape[0], longest=max(source_width, target_width),
            reach=source_width + target_width, in_windows=False,
            ids=ids, positions=within + first[rows], sources=sources, source_tokens=source_tokens, reads=reads,
            plan=None if ids.device.type == "cpu" else make_plan(reads, sources), row_of_token=rows,
            predictors=torch.where(within == 0, before[rows], steps - 1)[source_tokens:],
        )  # fmt: skip

    def segments(self, key: Tensor, value: Tensor) -> list[Segment]:
        """The sources, which targets read."""
        of_sources = key[: self.source_tokens], value[: self.source_tokens]
        offsets = self.cu_seqlens_k[: self.sources + 1]
        return [Segment(*of_sources, ids=self.reads, cu_seqlens=offsets, plan=self.plan)]


def shared_forward(model: Any, state: Any, forward: Callable, arguments: dict[str, Any], context: Any) -> Any:
    """The forward of a patched model for a batch of `SharedSourceCollator`.

    Args:
        model: the patched model. state: its `HostState`. forward: its class's own.
        arguments: the call's, by name.
        context: the prefix, if the call brings one.

    Raises:
        ValueError, TypeError: a batch that does not fit together. NotImplementedError: a model that cannot compute a
            source apart from its rows, with the reason.
    """
    _check_model(model, state)
    _check_arguments(type(model).__name__, next(model.parameters()).device, arguments)
    if model.config.is_encoder_decoder:
        return _encoded_once(model, state, forward, arguments, context)
    rows = SharedRows.of(arguments)
    context = context or _context(model, state, _of_sources(arguments), arguments.get("prefix_ids"))
    length = context.length
    positions = rows.positions + (length if isinstance(length, int) else length.squeeze(1)[rows.row_of_token])
    families.check_positions(positions, state.limit, type(model).__name__)
    given = {
        "input_ids": rows.ids.unsqueeze(0),
        "position_ids": positions.unsqueeze(0),
        "attention_mask": torch.ones_like(rows.ids).unsqueeze(0),  # or restarting positions would mean several texts
        "use_cache": False,
        hub.KEYWORD: packed.PackedContext(context, rows),
    }
    plan = state.plan if isinstance(state.plan, LossPlan) else None
    states = forward(model, **given, return_dict=True).logits if plan is None else _hidden_states(model, plan, given)
    return _output(model, plan, states[0][rows.predictors], rows.ids[rows.source_tokens :], arguments)


def _output(
    model: Any, plan: LossPlan | None, hidden: Tensor, tokens: Tensor, arguments: dict[str, Any]
) -> SharedSourceOutput:
    """Loss and log-probabilities of the target tokens.

    Args:
        model: the patched model. plan: of its class.
        hidden: [target tokens, hidden] the states that predict them; without a plan, the logits.
        tokens: [target tokens].
        arguments: the call's.
    """
    labels, loss, logps = arguments.get("labels"), None, None
    given = {name: arguments[name] for name in LOSS_ARGUMENTS if name in arguments}
    if labels is not None:
        labels = labels[:, 1:][arguments["target_mask"].bool()]
    ignored = given.get("ignore_index", IGNORED)
    if arguments.get(PER_TOKEN):
        wanted = [tokens] if labels is None else [tokens, labels.masked_fill(labels == ignored, 0)]
        head = _same if plan is None else functools.partial(plan.logits, model)
        logps, *of_labels = _log_probabilities(head, hidden, wanted)
        if labels is not None:
            labelled = labels != ignored
            items = given.get("num_items_in_batch", labelled.sum())
            loss = -of_labels[0].masked_fill(~labelled, 0).sum() / items
    elif labels is not None and plan is not None:
        loss, _ = loss_of_states(model, plan, hidden, labels, ignored, given)
    elif labels is not None:
        labelled, width = labels != ignored, hidden.shape[-1]
        loss = model.loss_function(
            logits=hidden[labelled], labels=None, vocab_size=width, shift_labels=labels[labelled], **given
        )
    return SharedSourceOutput(loss=loss, per_token_logps=logps)


def _log_probabilities(head: Callable, hidden: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Those of each list of tokens, [rows] each; the logits of many rows are computed in parts, backward once more."""

    def part(hidden: Tensor, *wanted: Tensor) -> list[Tensor]:
        logps = head(hidden).float().log_softmax(-1)
        return [logps.gather(1, tokens.unsqueeze(1)).squeeze(1) for tokens in wanted]

    if hidden.shape[0] <= _ROWS:
        return part(hidden, *wanted)
    split = zip(*(rows.split(_ROWS) for rows in (hidden, *wanted)), strict=True)
    parts = [checkpoint(part, *rows, use_reentrant=False, preserve_rng_state=False) for rows in split]
    return [torch.cat(found) for found in zip(*parts, strict=True)]


def _hidden_states(model: Any, plan: LossPlan, given: dict[str, Any]) -> Tensor:
    """The base's last hidden states, [1, total, hidden]."""
    rest = dict(given)
    named = {inner: rest.pop(outer, None) for inner, outer in plan.base_arguments.items()}
    base = functools.reduce(getattr, plan.base, model)
    return base(**named, **rest).last_hidden_state


def _same(logits: Tensor) -> Tensor:
    return logits


def _encoded_once(model: Any, state: Any, forward: Callable, arguments: dict[str, Any], context: Any) -> Any:
    """The forward of an encoder-decoder: the encoder's states of a source are read by all of its rows."""
    source_mask, target_mask = arguments["source_mask"].bool(), arguments["target_mask"].bool()
    index, targets, labels = arguments["source_index"].long(), arguments["target_ids"], arguments.get("labels")
    of_sources = context or _context(model, state, _of_sources(arguments))
    chosen = arguments.get("prefix_ids")
    of_rows = of_sources if context is not None or chosen is None else _context(model, state, chosen)
    given: dict[str, Any] = {"use_cache": False, "return_dict": True, hub.KEYWORD: of_rows}
    if "num_items_in_batch" in arguments:
        given["num_items_in_batch"] = arguments["num_items_in_batch"]
    given["decoder_input_ids"] = state.plan.decoder_input_ids(model, targets.masked_fill(~target_mask, IGNORED))
    if labels is not None:
        given["labels"] = labels[:, 1:]
    pairs = None
    if state.packs:
        pairs = packed_seq2seq.shared_pairs(model, state.positions, source_mask, target_mask, index, of_sources)
    if pairs is not None:
        try:
            output = _packed_once(model, forward, given, pairs, arguments["source_ids"])
        except packed.CannotPackError:
            state.packs, pairs = False, None
    if pairs is None:
        encoded = model.get_encoder()(
            input_ids=arguments["source_ids"],
            attention_mask=source_mask.long(),
            return_dict=True,
            **{hub.KEYWORD: of_sources},
        )
        given["encoder_outputs"] = type(encoded)(last_hidden_state=encoded.last_hidden_state[index])
        output = model._prefix_forward(forward, (), {**given, "attention_mask": source_mask[index].long()})
    logps = None
    if arguments.get(PER_TOKEN):
        logits = output.logits[target_mask] if pairs is None else output.logits[0]
        logps = -torch.nn.functional.cross_entropy(logits.float(), targets[target_mask], reduction="none")
    return SharedSourceOutput(loss=output.loss, per_token_logps=logps)


def _packed_once(
    model: Any, forward: Callable, given: dict[str, Any], pairs: packed_seq2seq.PackedPairs, source_ids: Tensor
) -> Any:
    """The output of packed sources and targets; its logits are those of [1, target tokens]."""
    labels = given.get("labels")
    packed_labels = {} if labels is None else {"labels": pairs.target.pack(labels)}
    run = functools.partial(pairs.forward, forward)
    # The mask says that there is no more to leave out.
    inputs = {"input_ids": source_ids, "decoder_attention_mask": torch.ones_like(given["decoder_input_ids"])}
    return model._prefix_forward(run, (), {**given, **inputs, **packed_labels})


def _context(model: Any, state: Any, *prefix_ids: Any) -> hub.PrefixContext:
    """The model's prefix; of a bank, for rows with these ids, one after another."""
    chosen: Any = None
    if prefix_ids[0] is not None:
        tensors = isinstance(prefix_ids[0], Tensor)
        chosen = torch.cat(prefix_ids) if tensors else [name for part in prefix_ids for name in part]
    arguments = {} if chosen is None else {"prefix_ids": chosen}
    return model._prefix_context(arguments) or hub.PrefixContext({}, state.backend)


def _of_sources(arguments: dict[str, Any]) -> Any:
    """The prefix that each source reads, which is what its rows read; None where the rows choose none."""
    chosen, index, count = arguments.get("prefix_ids"), arguments["source_index"].long(), len(arguments["source_ids"])
    if chosen is None:
        return None
    if isinstance(chosen, Tensor):
        of_sources: Any = torch.full_like(chosen[:1], -1).repeat(count).scatter_(0, index, chosen)
        agree = chosen.device.type != "cpu" or torch.equal(of_sources[index], chosen)
    else:
        first = dict(zip(reversed(index.tolist()), reversed(chosen), strict=True))
        of_sources = [first.get(source) for source in range(count)]
        agree = all(of_sources[source] == name for source, name in zip(index.tolist(), chosen, strict=True))
    if not agree:
        raise ValueError(
            "shared sources: expected one prefix for all rows of a source, got several, under which the source is not"
            " the same; give the source once for each prefix, as SharedSourceCollator does"
        )
    return of_sources


def _check_model(model: Any, state: Any) -> None:
    """Raise NotImplementedError unless the model's loss is a sum over tokens that only see tokens before them."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    name, config = type(model).__name__, model.config
    reason = ""
    if config.is_encoder_decoder:
        if model.main_input_name != "input_ids" or not isinstance(state.plan, Seq2SeqPlan):
            reason = "whose source is not text, or whose decoder's inputs are not labels shifted by one"
    elif state.positions == "tokens":
        reason = "which counts positions from its padding tokens"
    elif model.loss_function is not ForCausalLMLoss:
        reason = f"whose loss is {getattr(model.loss_function, '__name__', model.loss_function)}"
    elif getattr(config, "output_router_logits", False):
        reason = "with output_router_logits=True, whose router's loss counts every copy of a source"
    if reason:
        raise NotImplementedError(
            f"shared sources: expected a language model with transformers' loss, got {name}, {reason}; pass ordinary"
            " rows"
        )


def _check_arguments(name: str, device: torch.device, arguments: dict[str, Any]) -> None:
    """Raise unless the batch fits together. Values are looked at on the CPU only."""
    given = {key for key, value in arguments.items() if value is not None}
    missing, unknown = set(_TENSORS) - given, given - set(KEYWORDS) - _OTHERS
    if missing or unknown:
        raise ValueError(
            f"{name}: expected {', '.join(_TENSORS)} and no inputs beside them, got a call without"
            f" {sorted(missing)} and with {sorted(unknown)}; SharedSourceCollator makes such batches"
        )
    if "labels" not in given and not arguments.get(PER_TOKEN):
        raise ValueError(f"{name}: expected labels or {PER_TOKEN}=True with shared sources, got neither")
    tensors = {key: arguments[key] for key in (*_TENSORS, "labels") if key in given}
    if isinstance(arguments.get("prefix_ids"), Tensor):
        tensors["prefix_ids"] = arguments["prefix_ids"]
    devices = {key: str(tensor.device) for key, tensor in tensors.items()}
    if set(devices.values()) != {str(device)}:
        raise ValueError(f"{name}: expected the whole batch on the model's device, {device}, got {devices}")
    sources, targets = arguments["source_ids"].shape, arguments["target_ids"].shape
    wanted = {
        "source_ids": sources[:2], "source_mask": sources, "target_ids": targets[:2], "target_mask": targets,
        "source_index": targets[:1], "prefix_ids": targets[:1], "labels": (targets[0], targets[-1] + 1),
    }  # fmt: skip
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(wanted[key]) or 0 in tensor.shape:
            raise ValueError(f"{name}: expected {key} of shape {tuple(wanted[key])}, got {tuple(tensor.shape)}")
    chosen = arguments.get("prefix_ids")
    if chosen is not None and len(chosen) != targets[0]:
        raise ValueError(f"{name}: expected prefix_ids for each of the {targets[0]} targets, got {len(chosen)}")
    if device.type == "cpu":
        _check_values(name, arguments)


def _check_values(name: str, arguments: dict[str, Any]) -> None:
    index, sources = arguments["source_index"], arguments["source_ids"].shape[0]
    wrong = index[(index < 0) | (index >= sources)]
    if wrong.numel():
        raise ValueError(
            f"{name}: expected source_index to name one of the batch's {sources} sources, 0 to {sources - 1}, got"
            f" {wrong.tolist()}"
        )
    for kind in ("source", "target"):
        empty = (~arguments[f"{kind}_mask"].bool().any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"{name}: expected every {kind} to have a token, got none in {kind}_mask of rows {empty}")
