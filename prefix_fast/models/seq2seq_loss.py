"""Head and loss of an encoder-decoder on the labelled positions only.

    hidden = decoder(...)               [B, T, hidden], one state for each label, without a shift
    rows   = hidden[labels ≠ -100]      [1, N, hidden]
    loss   = the class's own statements after the head, on logits [1, N, vocabulary] and labels [1, N]

The class's forward runs as it is: the head is given the chosen rows, and the forward is given the chosen labels
together with the decoder's input that it would have made of all of them. Where the head is frozen it gets no row and
the forward no label; head and loss are then one function (`linear_loss`). Whether a class uses labels and logits for
nothing else is read from the source of its forward; any other statement and the class keeps its own path. Where a call
allows it, encoder and decoder compute no padding (`packed_seq2seq`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefix_fast.models import packed_seq2seq
from prefix_fast.models.head import frozen_head
from prefix_fast.models.outputs import lazy_output
from prefix_fast.models.packed import CannotPackError
from prefix_fast.models.packed_seq2seq import PackedPairs
from prefix_fast.sources import IGNORED

# What forwards do with labels and logits, as ast.unparse writes it; (?P<name>) says where the names stand.
_BIAS = r"self\.final_logits_bias(?:\.to\(lm_logits\.device\))?"
_SHIFT = re.compile(
    r"if labels is not None(?: and decoder_input_ids is None and \(decoder_inputs_embeds is None\))?:\n"
    r"(?P<uncached>    if use_cache:\n        logger\.warning\('[^\n]*'\)\n    use_cache = False\n)?"
    r"(?:    if labels\.shape\[1\] > self\.max_target_positions:\n        raise ValueError\([^\n]*\)\n)?"
    r"(?:    if decoder_input_ids is None(?: and decoder_inputs_embeds is None)?:\n    )?"
    r"    decoder_input_ids = (?P<shift>self\._shift_right|shift_tokens_right)"
    r"\(labels(?P<fields>(?:, self\.config\.\w+)*)\)"
)
_HEAD = re.compile(rf"lm_logits = self\.(?P<head>\w+)\([\w.\[\]]+\)(?P<bias> \+ {_BIAS})?")
_ADD_BIAS = re.compile(rf"lm_logits = lm_logits \+ {_BIAS}")
_LOSS = re.compile(
    r"if labels is not None:\n"
    r"(?:    labels = labels\.to\(lm_logits\.device\)\n)?"
    r"    loss_fct = CrossEntropyLoss\((?:ignore_index=-100)?\)\n"
    r"(?:    labels = labels\.to\(lm_logits\.device\)\n)?"
    r"    \w+ = loss_fct\(lm_logits\.view\(-1, (?:self\.config\.(?:decoder_)?vocab_size|lm_logits\.size\(-1\))\),"
    r" labels\.(?:view|reshape)\(-1\)\)"
)
_TUPLE = re.compile(r"if not return_dict:\n    output = \(lm_logits,\) \+ outputs\[1:\]\n    return [^\n]*")
_RETURN = re.compile(r"return Seq2SeqLMOutput\(loss=\w+, logits=lm_logits(?:, \w+=\w+\.\w+)*\)")


@dataclass(frozen=True)
class Seq2SeqPlan:
    """What a class does between the decoder's states and the logits.

    Attributes:
        head: the attribute of the head.
        has_bias: whether `final_logits_bias` is added.
        shift: the function that makes the decoder's input of labels, or its name on the model.
        shift_fields: the config's fields that it is given.
        caches: whether the decoder may return a cache beside a loss.
    """

    head: str
    has_bias: bool
    shift: Callable | str
    shift_fields: tuple[str, ...]
    caches: bool

    def decoder_input_ids(self, model: Any, labels: Tensor) -> Tensor:
        """[B, T], as the class's forward makes them of labels."""
        shift = getattr(model, self.shift) if isinstance(self.shift, str) else self.shift
        return shift(labels, *(getattr(model.config, name) for name in self.shift_fields))

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        """[..., hidden] → [..., vocabulary]."""
        logits = getattr(model, self.head)(hidden)
        return logits + model.final_logits_bias.to(logits.device) if self.has_bias else logits


@functools.cache
def seq2seq_plan(model_class: Any) -> Seq2SeqPlan | None:
    """The plan of a class; None: it has no head, uses labels or logits in another way, or cannot be read."""
    forward = inspect.unwrap(model_class.forward)
    statements = _statements(forward)
    found: dict[re.Pattern, list[re.Match]] = {
        pattern: [] for pattern in (_SHIFT, _HEAD, _ADD_BIAS, _LOSS, _TUPLE, _RETURN)
    }
    for statement in statements:
        match = next((match for pattern in found if (match := pattern.fullmatch(statement))), None)
        if match is not None:
            found[match.re].append(match)
        elif re.search(r"\b(labels|lm_logits|logits)\b", statement):
            return None
    if any(len(found[pattern]) != 1 for pattern in (_SHIFT, _HEAD, _LOSS, _RETURN)):
        return None
    biases = len(found[_ADD_BIAS]) + (found[_HEAD][0]["bias"] is not None)
    if biases > 1:
        return None
    name, fields = found[_SHIFT][0].group("shift", "fields")
    shift = name.removeprefix("self.") if name.startswith("self.") else forward.__globals__[name]
    return Seq2SeqPlan(
        head=found[_HEAD][0]["head"],
        has_bias=biases == 1,
        shift=shift,
        shift_fields=tuple(re.findall(r"config\.(\w+)", fields)),
        caches=found[_SHIFT][0]["uncached"] is None,
    )


def _statements(function: Callable) -> list[str]:
    """The statements of a function without its docstring, as ast.unparse writes them; none if it cannot be read."""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return []
    body = getattr(parsed, "body", [])
    return [
        ast.unparse(node) for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]


def can_fuse_seq2seq(model: Any, arguments: dict[str, Any]) -> bool:
    """Whether this call is one that the plan covers: labels [B, T] and an output with names. Not a traced one."""
    return_dict = arguments.get("return_dict")
    return_dict = getattr(model.config, "return_dict", True) if return_dict is None else return_dict
    return bool(return_dict) and arguments["labels"].dim() == 2 and not torch.compiler.is_compiling()


def fused_seq2seq_forward(
    model: Any, plan: Seq2SeqPlan, forward: Callable, arguments: dict[str, Any], state: Any
) -> Any:
    """The class's forward of a training call with labels, its head on the labelled positions only.

    Args:
        model: the patched model. plan: of its class. forward: the class's own.
        arguments: the call's, by name, with the prefix.
        state: the model's `HostState`, which says whether it computes on packed rows.

    Raises:
        ValueError: labels of another shape than the decoder's tokens.
    """
    given = dict(arguments)
    shifted = given.get("decoder_input_ids") is None and given.get("decoder_inputs_embeds") is None
    if shifted:
        given["decoder_input_ids"] = plan.decoder_input_ids(model, given["labels"])
    pairs = None
    if state.packs:
        pairs = packed_seq2seq.padding_free(model, state.positions, given, shifted, plan.caches)
    if pairs is not None:
        try:
            return _labelled_forward(model, plan, functools.partial(pairs.forward, forward), given, pairs)
        except CannotPackError:
            state.packs = False
    return _labelled_forward(model, plan, forward, given, None)


def _labelled_forward(
    model: Any, plan: Seq2SeqPlan, forward: Callable, arguments: dict[str, Any], pairs: PackedPairs | None
) -> Any:
    """The forward with the head on the labelled positions only; of packed rows, that of `pairs`."""
    labels = arguments["labels"] if pairs is None else pairs.target.pack(arguments["labels"])
    chosen = labels != IGNORED
    head, seen = getattr(model, plan.head), []
    frozen = frozen_head(head, model.final_logits_bias if plan.has_bias else None)
    given = {**arguments, "labels": labels[chosen].unsqueeze(0) if frozen is None else labels.new_empty((1, 0))}

    def labelled_rows(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (hidden,) = inputs
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"{type(model).__name__}: expected labels {tuple(hidden.shape[:-1])}, one for each decoder token, got"
                f" {tuple(labels.shape)}; pad labels as the decoder's tokens are padded, with {IGNORED}"
            )
        seen.append(hidden)
        return (hidden[chosen.to(hidden.device)].unsqueeze(0) if frozen is None else hidden.detach()[:1, :0],)

    handle = head.register_forward_pre_hook(labelled_rows)
    try:
        output = forward(model, **given)
    finally:
        handle.remove()

    def logits() -> Tensor:
        return plan.logits(model, seen[0] if pairs is None else pairs.target.unpack(seen[0]))

    fields = {name: value for name, value in output.items() if name != "logits"}
    if frozen is not None:
        fields["loss"] = frozen.loss(seen[0], labels.to(seen[0].device), IGNORED).to(output.loss.dtype)
    return lazy_output(model, type(output), logits, output.logits.dtype, **fields)
