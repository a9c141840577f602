"""Head and loss on the labelled positions only, for models whose forward is base → head → causal language model loss.

    hidden = base(...)                  [B, T, hidden]
    rows   = hidden[labels ≠ ignored]   [N, hidden], the states that predict a label
    loss   = loss_function(head(rows))  the model's own, with its num_items_in_batch and ignore_index

A frozen head and the loss are one function, which never has the logits of all rows (`linear_loss`). The full logits
[B, T, vocabulary] are computed, with their graph, when something first reads them. Whether a class is of that form is
read from the source of its forward, statement by statement; any other statement and the class keeps its own path, so a
new model is slow at worst.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefix_fast.models import packed
from prefix_fast.models.head import frozen_head
from prefix_fast.models.outputs import Deferred, Draws, lazy_output

LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


class _Scaling(NamedTuple):
    """What a class does to the logits between head and loss, and the same as options of `linear_cross_entropy`."""

    apply: Callable[[Any, Tensor], Tensor]
    options: Callable[[Any], dict[str, Any]]


def _softcapped(model: Any, logits: Tensor) -> Tensor:
    cap = model.config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


# Each key is the statement as ast.unparse writes it.
_SCALINGS = {
    "logits = logits / self.config.logits_scaling": _Scaling(
        lambda model, x: x / model.config.logits_scaling,
        lambda model: {"logit_scale": 1 / model.config.logits_scaling},
    ),
    "logits = logits * self.logit_scale": _Scaling(
        lambda model, x: x * model.logit_scale, lambda model: {"logit_scale": model.logit_scale}
    ),
    "if self.config.final_logit_softcapping is not None:\n"
    "    logits = logits / self.config.final_logit_softcapping\n"
    "    logits = torch.tanh(logits)\n"
    "    logits = logits * self.config.final_logit_softcapping": _Scaling(
        _softcapped, lambda model: {"softcap": model.config.final_logit_softcapping}
    ),
}
_HIDDEN = {
    "hidden_states = {0}.last_hidden_state",
    "hidden_states = {0}[0]",
    "hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)",
    "slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep",
}
_HEAD_INPUTS = {"hidden_states", "hidden_states[:, slice_indices, :]"}
_LOSS_CALLS = {"labels", "logits", "self.config.vocab_size", "self.vocab_size", "kwargs"}


@dataclass
class LossPlan:
    """How a class's forward goes from its base to its output.

    Attributes:
        base: the attributes from the model to its base, as ("model", "decoder").
        base_arguments: arguments of the forward that the base gets: its own name → the forward's name.
        extra_arguments: whether the base also gets all remaining keywords.
        head: the attribute of the head.
        scalings: what is done to the logits after the head.
        output_class: the class of the output.
        output_fields: fields of the output → fields of the base's output.
    """

    base: tuple[str, ...] = ()
    base_arguments: dict[str, str] = field(default_factory=dict)
    extra_arguments: bool = False
    head: str = ""
    scalings: tuple[str, ...] = ()
    output_class: type | None = None
    output_fields: dict[str, str] = field(default_factory=dict)

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        """Head and scalings: [..., hidden] → [..., vocabulary]."""
        logits = getattr(model, self.head)(hidden)
        for statement in self.scalings:
            logits = _SCALINGS[statement].apply(model, logits)
        return logits


class _OtherForm(Exception):  # noqa: N818 - a signal within this module
    """The forward does something that a LossPlan cannot say."""


@functools.cache
def loss_plan(model_class: Any) -> LossPlan | None:
    """The plan of a class, or None if its forward is not base → head → loss or its source cannot be read."""
    forward = inspect.unwrap(model_class.forward)
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
        if not isinstance(function, ast.FunctionDef):
            return None
        return _Reader(function, forward).plan()
    except (OSError, TypeError, SyntaxError, _OtherForm):
        return None


class _Reader:
    """Walks the statements of a forward and takes note of each, or raises `_OtherForm`."""

    def __init__(self, function: ast.FunctionDef, forward: Callable) -> None:
        self.statements = function.body
        self.parameters = [argument.arg for argument in function.args.args]
        self.forward = forward
        self.found = LossPlan()
        self.outputs = ""
        self.has_loss = False

    def plan(self) -> LossPlan:
        for statement in self.statements:
            text = ast.unparse(statement)
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue
            if text in _SCALINGS and self.found.head:
                self.found.scalings = (*self.found.scalings, text)
            elif isinstance(statement, ast.Return):
                self._output(statement)
            elif isinstance(statement, ast.If):
                self._loss(statement)
            elif text != "loss = None" and text not in {form.format(self.outputs) for form in _HIDDEN}:
                self._assignment(statement)
        found = self.found
        if not (found.base and found.head and found.output_class and self.has_loss):
            raise _OtherForm
        return found

    def _assignment(self, statement: ast.stmt) -> None:
        target: ast.expr
        value: ast.expr | None
        if isinstance(statement, ast.AnnAssign):
            target, value = statement.target, statement.value
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
        else:
            raise _OtherForm
        if not isinstance(target, ast.Name) or not isinstance(value, ast.Call):
            raise _OtherForm
        if target.id == "logits":
            self._head(value)
        elif not self.found.base:
            self._base(target.id, value)
        else:
            raise _OtherForm

    def _head(self, call: ast.Call) -> None:
        if ast.unparse(call.func).endswith(".contiguous") and isinstance(call.func, ast.Attribute):
            call = call.func.value if isinstance(call.func.value, ast.Call) else call
        names = _attributes(call.func)
        if self.found.head or len(names) != 1 or call.keywords or len(call.args) != 1:
            raise _OtherForm
        if ast.unparse(call.args[0]) not in _HEAD_INPUTS:
            raise _OtherForm
        self.found.head = names[0]

    def _base(self, outputs: str, call: ast.Call) -> None:
        self.found.base, self.outputs = _attributes(call.func), outputs
        values = [*enumerate(call.args), *((keyword.arg, keyword.value) for keyword in call.keywords)]
        for name, value in values:
            if not isinstance(value, ast.Name):
                raise _OtherForm
            if name is None:
                self.found.extra_arguments = True
            elif value.id not in self.parameters or (name == 0 and value.id != "input_ids") or name in range(1, 99):
                raise _OtherForm
            else:
                self.found.base_arguments["input_ids" if name == 0 else str(name)] = value.id

    def _loss(self, statement: ast.If) -> None:
        body = statement.body
        if ast.unparse(statement.test) != "labels is not None" or statement.orelse or len(body) != 1:
            raise _OtherForm
        call = body[0].value if isinstance(body[0], ast.Assign) else None
        if not isinstance(call, ast.Call) or ast.unparse(body[0]).split("(")[0] != "loss = self.loss_function":
            raise _OtherForm
        given = {ast.unparse(value) for value in [*call.args, *(keyword.value for keyword in call.keywords)]}
        if not given <= _LOSS_CALLS:
            raise _OtherForm
        self.has_loss = True

    def _output(self, statement: ast.Return) -> None:
        call = statement.value
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise _OtherForm
        for keyword in call.keywords:
            text = ast.unparse(keyword.value)
            if keyword.arg in ("loss", "logits") and text == keyword.arg:
                continue
            if keyword.arg is None or not text.startswith(f"{self.outputs}.") or text.count(".") != 1:
                raise _OtherForm
            self.found.output_fields[keyword.arg] = text.split(".")[1]
        self.found.output_class = self.forward.__globals__[call.func.id]


def _attributes(node: ast.expr) -> tuple[str, ...]:
    """("a", "b") of `self.a.b`."""
    names = ast.unparse(node).split(".")
    if names[0] != "self" or len(names) < 2 or not all(name.isidentifier() for name in names):
        raise _OtherForm
    return tuple(names[1:])


def can_fuse(model: Any, arguments: dict[str, Any]) -> bool:
    """Whether this call is one that the plan covers: the standard loss, all logits, an output with names."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    keep = arguments.get("logits_to_keep", 0)
    return_dict = arguments.get("return_dict")
    return_dict = getattr(model.config, "return_dict", True) if return_dict is None else return_dict
    return bool(return_dict) and isinstance(keep, int) and keep == 0 and model.loss_function is ForCausalLMLoss


def fused_forward(model: Any, plan: LossPlan, arguments: dict[str, Any], state: Any) -> Any:
    """The forward of a training call with labels.

    Args:
        model: the patched model.
        plan: of its class.
        arguments: the call's, by name, with the prefix and shifted positions.
        state: the model's `HostState`, which says whether it computes on packed rows.

    Raises:
        ValueError: labels of another shape than the tokens.
    """
    rest = dict(arguments)
    rest.pop("logits_to_keep", None)
    rest.pop("return_dict", None)
    labels = rest.pop("labels")
    loss_arguments = {name: rest.pop(name) for name in LOSS_ARGUMENTS if name in rest}
    ignored = loss_arguments.get("ignore_index", -100)
    targets = loss_arguments.pop("shift_labels", None)
    if targets is None:
        targets = torch.nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:].contiguous()
    rows = packed.padding_free(model, rest, targets, ignored, state.trims) if state.packs else None
    if rows is not None:
        targets = rows.pack(targets)
    draws = None if rows is None or rows.last is None else Draws(targets.device)
    kept: dict[int, tuple[Tensor, Tensor]] | None = {} if rows is not None and packed.wants_cache(model, rest) else None
    outputs = _run_base(model, plan, rest, rows, kept)
    hidden = outputs.last_hidden_state
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{type(model).__name__}: expected labels {tuple(hidden.shape[:-1])}, one for each token, got"
            f" {tuple(targets.shape)}; pad labels as the tokens are padded, with {ignored}"
        )
    loss, dtype = loss_of_states(model, plan, hidden, targets.to(hidden.device), ignored, loss_arguments)
    fields = {name: getattr(outputs, inner, None) for name, inner in plan.output_fields.items()}
    if plan.output_class is None or torch.compiler.is_compiling():
        return plan.output_class(loss=loss, logits=None, **fields)  # type: ignore[misc]
    if kept and rows is not None and "past_key_values" in fields:
        fields["past_key_values"] = Deferred(functools.partial(packed.unpacked_cache, model.config, kept, rows))

    def logits() -> Tensor:
        if rows is None:
            return plan.logits(model, hidden)
        if draws is None:
            return plan.logits(model, rows.unpack(hidden))
        state.trims = False  # who reads them once reads them in every step
        whole = dataclasses.replace(rows, last=None)
        with draws.again():
            return plan.logits(model, whole.unpack(_run_base(model, plan, rest, whole, None).last_hidden_state))

    return lazy_output(model, plan.output_class, logits, dtype, loss=loss, **fields)


def _run_base(
    model: Any,
    plan: LossPlan,
    arguments: dict[str, Any],
    rows: packed.PaddedRows | None,
    kept: dict[int, tuple[Tensor, Tensor]] | None,
) -> Any:
    """The base's output, of the whole batch or of packed rows of it, whose keys and values are then `kept`."""
    rest = dict(arguments) if rows is None else packed.packed_arguments(arguments, rows, kept)
    given = {inner: rest.pop(outer, None) for inner, outer in plan.base_arguments.items()}
    base = functools.reduce(getattr, plan.base, model)
    return base(**given, **(rest if plan.extra_arguments else {}))


def loss_of_states(
    model: Any, plan: LossPlan, hidden: Tensor, targets: Tensor, ignored: int, arguments: dict[str, Any]
) -> tuple[Tensor, torch.dtype]:
    """The loss of states and targets, and the dtype of their logits."""
    head = frozen_head(getattr(model, plan.head)) if len(plan.scalings) < 2 else None
    if head is not None:
        options = _SCALINGS[plan.scalings[0]].options(model) if plan.scalings else {}
        loss = head.loss(hidden, targets, ignored, denominator=arguments.get("num_items_in_batch"), **options)
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        return loss, torch.get_autocast_dtype(device) if autocast else hidden.dtype
    # The number of labels is data: a compiled graph keeps all rows instead.
    if not torch.compiler.is_compiling():
        hidden, targets = hidden[targets != ignored], targets[targets != ignored]
    logits = plan.logits(model, hidden)
    loss = model.loss_function(
        logits=logits, labels=None, vocab_size=logits.shape[-1], shift_labels=targets, **arguments
    )
    return loss, logits.dtype
