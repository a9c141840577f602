"""A transformers model that reads a prefix: its class steps aside for a subclass of the same name.

    model.__class__ = type(cls.__name__, (mixin, cls), {...})

`isinstance`, the class's name and module, and the signature of its forward stay as they were, so `generate`, Trainer
and PEFT see the model that they know; copies and pickles of the model keep the prefix. `PrefixHost` owns its prefix
(the submodule `prefix`); `BorrowingHost` gets one with each call, from the PeftModel around it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefix_fast import half
from prefix_fast.choice import Choice
from prefix_fast.models import checkpointing, families, hub, packed, saving, shared_sources, sites
from prefix_fast.models.checkpointing import STATE
from prefix_fast.models.hub import States
from prefix_fast.models.loss import LossPlan, can_fuse, fused_forward
from prefix_fast.models.seq2seq_loss import Seq2SeqPlan, can_fuse_seq2seq, fused_seq2seq_forward


@dataclass
class HostState:
    """What a patched model remembers; kept in the model's `__dict__`, so that copies and pickles have it too.

    Attributes:
        backend, fused_loss, compute_dtype: as given to `patch`.
        attention: the name under which our attention function is registered for this model.
        positions: how the model counts positions itself (see `families`).
        limit: the positions in its table, if it has one; an encoder-decoder's is checked where it is read.
        parameters: the names of the forward's parameters, in order.
        packs: compute on packed rows where a call allows it; False once a layer's attention was not possible there.
        trims: leave out of the last layer what no label needs; False once something has read logits.
        requires_grad: of each parameter before it was frozen; None: nothing was frozen.
        plan: of the class's loss; None: it has another form than ours.
        input_grads: whether `enable_input_require_grads` is in force, so that `unpatch` lets it be so.
        states, choice: keys and values per site that a running `generate` computed once, and which row reads which.
    """

    backend: str
    fused_loss: bool
    compute_dtype: torch.dtype | None
    attention: str
    positions: str
    limit: int | None
    parameters: tuple[str, ...]
    packs: bool = True
    trims: bool = True
    requires_grad: dict[str, bool] | None = None
    plan: LossPlan | Seq2SeqPlan | None = None
    input_grads: bool = False
    states: States | None = field(default=None, repr=False)
    choice: Choice | None = field(default=None, repr=False)

    @classmethod
    def of(cls, model: Any, **known: Any) -> HostState:
        """The state of a model whose config points at our attention already; `known`: the remaining attributes."""
        return cls(
            attention=model.config._attn_implementation,
            limit=None if model.config.is_encoder_decoder else families.position_limit(model),
            parameters=forward_parameters(model),
            **known,
        )


class SteppedAside:
    """Whatever has one of our classes in the place of its own; copies and pickles have it too."""

    _prefix_fast_class: Any  # the class that was stepped into

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._prefix_fast_class, _mixin_of(type(self))), self.__dict__


class HostMixin(checkpointing.Checkpointed, SteppedAside):
    """What a patched transformers model does otherwise than its class."""

    _prefix_fast_keywords: tuple[str, ...] = ()  # what the forward takes beside the class's arguments

    def _prefix_context(self, arguments: dict[str, Any]) -> hub.PrefixContext | None:
        """The prefix of a call that does not bring one; takes its own keywords out of the arguments."""
        return None

    def _prefix_forward(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The call of `forward`, the class's own, with the prefix and shifted positions."""
        state: HostState = self.__dict__[STATE]
        context = kwargs.pop(hub.KEYWORD, None)
        arguments = {**dict(zip(state.parameters, args, strict=False)), **kwargs}
        if any(name in arguments for name in shared_sources.KEYWORDS):
            self._keep_attention()
            with self._compute(next(self.parameters()).device.type):  # type: ignore[attr-defined]
                return shared_sources.shared_forward(self, state, forward, arguments, context)
        context = context or self._prefix_context(arguments)
        if context is None:
            return forward(self, *args, **kwargs)
        self._check_call(arguments)
        self._keep_attention()
        if self.config.is_encoder_decoder:  # type: ignore[attr-defined]
            return self._forward_seq2seq(forward, arguments, context)
        return self._forward_packed(functools.partial(self._forward_tokens, forward), arguments, context)

    def _backbone_forward(self, forward: Callable, arguments: dict[str, Any]) -> Any:
        """A call of the backbone by itself: hidden states, with the prefix."""
        context = arguments.pop(hub.KEYWORD, None) or self._prefix_context(arguments)
        if context is None:
            return forward(**arguments)
        self._check_call(arguments)
        self._keep_attention()
        return self._forward_packed(lambda arguments: forward(**arguments), arguments, context)

    def _forward_packed(self, run: Callable, arguments: dict[str, Any], context: hub.PrefixContext) -> Any:
        """`run` on the arguments with the prefix and shifted positions, several texts in a row kept apart."""
        state: HostState = self.__dict__[STATE]
        padding, explicit = self.config.pad_token_id, arguments.get("position_ids") is not None  # type: ignore[attr-defined]
        positions = families.shifted_positions(state.positions, arguments, context.length, padding)
        families.check_positions(positions, state.limit, type(self).__name__)
        if torch.compiler.is_compiling():
            _keep_rows_whole(arguments)
        context.placed = True
        arguments = {**arguments, "position_ids": positions, hub.KEYWORD: context}
        with self._compute(positions.device.type):
            if state.packs:
                try:
                    return run(packed.flattened(arguments, explicit))
                except packed.CannotPackError:
                    state.packs = False
            return run(arguments)

    def _forward_tokens(self, forward: Callable, arguments: dict[str, Any]) -> Any:
        state: HostState = self.__dict__[STATE]
        plan = self._plan(arguments)
        if isinstance(plan, LossPlan) and can_fuse(self, arguments):
            return fused_forward(self, plan, arguments, state)
        return forward(self, **arguments)

    def _forward_seq2seq(self, forward: Callable, arguments: dict[str, Any], context: hub.PrefixContext) -> Any:
        state: HostState = self.__dict__[STATE]
        arguments[hub.KEYWORD] = context
        plan = self._plan(arguments)
        device = next(self.parameters()).device.type  # type: ignore[attr-defined]
        with self._compute(device), sites.shifted(self, state.positions, context.length, context.choice):
            if isinstance(plan, Seq2SeqPlan) and can_fuse_seq2seq(self, arguments):
                return fused_seq2seq_forward(self, plan, forward, arguments, state)
            return forward(self, **arguments)

    def _plan(self, arguments: dict[str, Any]) -> LossPlan | Seq2SeqPlan | None:
        """How a training call with labels computes its loss; None: as the class does."""
        state: HostState = self.__dict__[STATE]
        wanted = state.fused_loss and self.training and arguments.get("labels") is not None  # type: ignore[attr-defined]
        return state.plan if wanted else None

    def _keep_attention(self) -> None:
        """Another model on this config may have been unpatched; calls without a prefix run the original attention."""
        state: HostState = self.__dict__[STATE]
        if self.config._attn_implementation != state.attention:  # type: ignore[attr-defined]
            self.config._attn_implementation = state.attention  # type: ignore[attr-defined]

    def _check_call(self, arguments: dict[str, Any]) -> None:
        name = type(self).__name__
        asked = arguments.get("output_attentions")
        if self.config.output_attentions if asked is None else asked:  # type: ignore[attr-defined]
            raise ValueError(
                f"{name}: expected output_attentions=False, got True; a patched model never forms the attention"
                " weights: unpatch it to look at them"
            )
        for mask in ("head_mask", "decoder_head_mask", "cross_attn_head_mask"):
            if arguments.get(mask) is not None:
                raise ValueError(f"{name}: expected no {mask}, got one; unpatch the model to mask heads")
        if arguments.get("prefix_ids") is not None:
            raise ValueError(
                f"{name}: expected no prefix_ids, got some, where all rows read one prefix; patch the model with a"
                " PrefixBank to choose"
            )
        inputs = ("input_ids", "inputs_embeds", "encoder_outputs", "input_features")
        if all(arguments.get(given) is None for given in inputs):
            raise ValueError(f"{name}: expected input_ids or inputs_embeds, got neither; pass one of them")

    def _compute(self, device: str) -> Any:
        dtype = self.__dict__[STATE].compute_dtype
        if dtype is not None and not torch.compiler.is_compiling():  # the model may have come here after patch
            half.check(type(self).__name__, torch.device(device), dtype)
        return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)

    def create_masks_for_generate(self, config: Any, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """The 2-D padding mask as it is: the layers' masks are never materialised, also for static caches."""
        return attention_mask

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Raises: a patched model computes attention to its prefix and nothing else can."""
        raise ValueError(
            f"{type(self).__name__}: expected no change of the attention implementation while a prefix is patched in,"
            f" got {attn_implementation!r}; unpatch the model first"
        )


class BorrowingHost(HostMixin):
    """The model inside a PeftModel: the prefix comes with the call, and the parameters stay as PEFT has them."""

    def _prefix_context(self, arguments: dict[str, Any]) -> hub.PrefixContext | None:
        """The prefix in the place of the cache, where PEFT's own code hands it over."""
        if not isinstance(arguments.get("past_key_values"), hub.PrefixContext):
            return None
        return arguments.pop("past_key_values")


class PrefixHost(HostMixin):
    """A model with a prefix of its own, in `model.prefix`."""

    def _prefix_context(self, arguments: dict[str, Any]) -> hub.PrefixContext:
        state: HostState = self.__dict__[STATE]
        states = self._states() if state.states is None else state.states
        shifts = self.prefix is None or self.prefix.shifts_positions  # type: ignore[attr-defined]
        return hub.PrefixContext(states, state.backend, shifts_positions=shifts)

    def _states(self) -> States:
        return {} if self.prefix is None else self.prefix()  # type: ignore[attr-defined]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of the class; the prefix's keys and values are computed once, not at every token."""
        with self._generating(args, kwargs):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _generating(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The context in which the class's `generate` runs, with these arguments."""
        return once_per_generation(self.__dict__[STATE], self._states)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves the prefix alone, or everything if the model is trained too (see `saving`)."""
        if self.__dict__[STATE].requires_grad is not None:
            return saving.save_prefix(self, save_directory, *args, **kwargs)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        return saving.save_beside_model(self, save_directory)

    @property
    def _keys_to_ignore_on_save(self) -> Any:
        """What a checkpoint leaves out; Trainer reads it after loading one."""
        if self.__dict__[STATE].requires_grad is None:
            return self._prefix_fast_class._keys_to_ignore_on_save
        return [name for name in self.state_dict() if not name.startswith("prefix.")]  # type: ignore[attr-defined]


@contextmanager
def once_per_generation(state: Any, compute: Callable[[], States]) -> Any:
    """Keep keys and values in `state.states` for the time of one `generate`."""
    before = state.states
    with torch.no_grad():
        state.states = {site: (keys.contiguous(), values.contiguous()) for site, (keys, values) in compute().items()}
    try:
        yield
    finally:
        state.states = before


def _keep_rows_whole(arguments: dict[str, Any]) -> None:
    """Say that a row is one text: a traced model cannot look whether positions restart, and prepares for several."""
    if all(arguments.get(name) is None for name in ("attention_mask", "position_ids", "past_key_values")):
        inputs = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
        arguments["attention_mask"] = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)


def _mixin_of(patched: type) -> type:
    return patched.__mro__[1]


@functools.cache
def patched_class(cls: Any, mixin: Any) -> Any:
    """The subclass of `cls` that an instance steps into; the same one for every instance."""
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._prefix_forward(original, args, kwargs)

    forward.__signature__ = _signature(original, mixin)  # type: ignore[attr-defined]
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_prefix_fast_class": cls,
        "forward": forward,
    }
    return type(cls.__name__, (mixin, cls), namespace)


def _signature(forward: Any, mixin: Any) -> inspect.Signature:
    """Of the patched forward, which Trainer and `generate` read."""
    signature = inspect.signature(forward)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in getattr(mixin, "_prefix_fast_keywords", ())
    ]
    parameters = list(signature.parameters.values())
    rest = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    own = [parameter for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*own, *added, *rest])


def _rebuild(cls: Any, mixin: Any) -> Any:
    """A bare instance for copy and pickle, in a process that may not have patched anything yet."""
    hub.register()
    return object.__new__(patched_class(cls, mixin))


def is_patched(model: Any) -> bool:
    """Whether the model's class is one of ours."""
    return "_prefix_fast_class" in type(model).__dict__


def step_in(model: Any, mixin: Any, state: Any, name: str = STATE) -> None:
    """Give the model our class, with `state` under its name."""
    cls: Any = type(model)
    model.__dict__[name] = state
    model.__class__ = patched_class(cls, mixin)
    if isinstance(state, HostState):
        checkpointing.leave_out_input_grads(model)


def step_out(model: Any, name: str = STATE) -> Any:
    """Give the model its own class back; returns the state it had."""
    model.__class__ = type(model)._prefix_fast_class
    state = model.__dict__.pop(name)
    if isinstance(state, HostState) and state.input_grads:
        model.enable_input_require_grads()
    return state


def forward_parameters(model: Any) -> tuple[str, ...]:
    """The names of the forward's parameters, in order."""
    return tuple(inspect.signature(model.forward).parameters)
