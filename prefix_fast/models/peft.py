"""PEFT models with prefix tuning or a cartridge: the prompt encoder's keys and values reach the layers without a cache.

Of an encoder-decoder PEFT fills the decoder's self-attention alone, whose layer l gets the prefix's layer 2l mod L.

PEFT repeats the prefix for every row, hands it over as the past of the cache, lengthens the padding mask and shifts the
positions. Here the PeftModel's forward and prepare_inputs_for_generation hand the model inside (of a classifier whose
forward takes no cache, its backbone) one `PrefixContext` instead, which shifts the positions by itself. Parameters,
configs, adapters and files are PEFT's own and stay untouched; `disable_adapter` works because it calls the model inside
without a prefix.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prefix_fast import selfcheck
from prefix_fast.checkpoint import PEFT_TYPES
from prefix_fast.geometry import Geometry, check_same_geometry, model_sites, peft_layers, split_flat
from prefix_fast.models import admission, hosts, hub, parts, sites
from prefix_fast.models.loss import loss_plan
from prefix_fast.models.seq2seq_loss import seq2seq_plan

STATE = "_prefix_fast_peft"


@dataclass
class PeftState:
    """What a patched PeftModel remembers: the operator's backend, and what a running `generate` computed once."""

    backend: str
    states: hub.States | None = field(default=None, repr=False)


class PeftHost(hosts.SteppedAside):
    """What a patched PeftModel does otherwise than its class while prefix tuning or a cartridge is active."""

    def _prefix_forward(self: Any, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not _is_prefix(self.active_peft_config):
            return forward(self, *args, **kwargs)
        arguments = {**dict(zip(_names(self._prefix_fast_class.forward), args, strict=False)), **kwargs}
        # As in PEFT: whatever cache the caller has, the prefix is the past.
        for name in ("past_key_values", "task_ids"):
            arguments.pop(name, None)
        if arguments.get("position_ids") is not None and arguments.get("attention_mask") is None:
            # A cache in PEFT's place keeps transformers from reading restarting positions as several texts in a row.
            arguments["attention_mask"] = torch.ones_like(arguments["position_ids"])
        return self._prefix_call(arguments)

    def _prefix_call(self: Any, arguments: dict[str, Any]) -> Any:
        """The model inside, with the prefix and the arguments that PEFT would hand on."""
        _drop_token_types(self, arguments)
        return self.base_model(**arguments, **{hub.KEYWORD: self._prefix_context()})

    def _prefix_context(self: Any) -> hub.PrefixContext:
        state: PeftState = self.__dict__[STATE]
        states = prompt_states(self) if state.states is None else state.states
        return hub.PrefixContext(states, state.backend, in_window=True)


class PeftLanguageModel(PeftHost):
    """A PeftModelForCausalLM or PeftModelForSeq2SeqLM."""

    def prepare_inputs_for_generation(self: Any, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The inputs of the model inside, with the prefix beside them."""
        if not _is_prefix(self.active_peft_config):
            return super().prepare_inputs_for_generation(*args, task_ids=task_ids, **kwargs)  # type: ignore[misc]
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        _drop_token_types(self, inputs)
        inputs[hub.KEYWORD] = self._prefix_context()
        return inputs

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in PEFT; the prefix's keys and values are computed once, not at every token."""
        if not _is_prefix(self.active_peft_config):
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        with hosts.once_per_generation(self.__dict__[STATE], lambda: prompt_states(self)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


class PeftClassifier(PeftHost):
    """A PeftModel for sequence or token classification or question answering: the head and the loss are PEFT's code."""

    def _prefix_call(self: Any, arguments: dict[str, Any]) -> Any:
        own = self._prefix_fast_class
        # Named by the forward and not by what it calls: PEFT leaves them out (QUESTION_ANS: token types, positions).
        for name in set(_names(own.forward)) - set(_names(own._prefix_tuning_forward)):
            arguments.pop(name, None)
        if arguments.get("return_dict") is None:
            arguments["return_dict"] = getattr(self.config, "return_dict", True)
        return own._prefix_tuning_forward(_Prompted(self, self._prefix_context()), **arguments)


class _Prompted:
    """The PeftModel as its own code sees it, with the prefix in the place of the cache that it would fill."""

    def __init__(self, model: Any, context: hub.PrefixContext) -> None:
        self._model = model
        self._context = context

    def get_prompt(self, *args: Any, **kwargs: Any) -> hub.PrefixContext:
        """What is handed on as `past_key_values`."""
        return self._context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@functools.cache
def _names(forward: Any) -> tuple[str, ...]:
    """The names of a forward's arguments, in order."""
    parameters = inspect.signature(forward).parameters
    return tuple(name for name, given in parameters.items() if given.kind is not given.VAR_KEYWORD)[1:]


def prompt_states(model: Any) -> hub.States:
    """The active adapter's keys and values, [L, 1, Hkv, P, D] each, as `PeftModel.get_prompt` takes them for one row.

    Equal to it in everything else: the encoder's training mode, `inference_mode`, the cast to the model's dtype.
    """
    config = model.active_peft_config
    encoder = model.prompt_encoder[model.active_adapter]
    if config.inference_mode or not getattr(encoder, "prefix_projection", True):
        flat = encoder.embedding.weight  # whose rows the tokens are, in order
    else:
        tokens = model.prompt_tokens[model.active_adapter][: config.num_virtual_tokens]
        flat = encoder(tokens[None].to(encoder.embedding.weight.device)).squeeze(0)
    if model.base_model_torch_dtype is not None:
        flat = flat.to(model.base_model_torch_dtype)
    keys, values = split_flat(flat, _geometry_of(config))
    if config.num_transformer_submodules == 2:
        layers = peft_layers(config.num_layers)[: model_sites(model.base_model.config).geometries["decoder"].num_layers]
        keys, values = keys[layers], values[layers]
    return {"decoder": (keys.unsqueeze(1), values.unsqueeze(1))}


def patch_peft(model: Any, backend: str, compute_dtype: torch.dtype | None, **options: Any) -> Any:
    """`patch` for a PeftModel; `options`: the remaining ones of its `HostState`.

    Raises:
        NotImplementedError: another adapter than prefix tuning or a cartridge, a task whose model has other prefixes,
            or a model inside that cannot be patched. ValueError: an adapter of other shapes than the model's, a model
            inside that is patched.
    """
    config = model.active_peft_config
    if not _is_prefix(config):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise NotImplementedError(
            f"patch: expected a PeftModel whose active adapter is prefix tuning or a cartridge, got {kind}; its prompt"
            " is no prefix of keys and values"
        )
    mixin = _mixin_for(model)
    reader = _reader(model)
    reader_class: Any = type(reader)
    admission.check_model(reader)
    if hosts.is_patched(reader) or hosts.is_patched(model.base_model):
        raise ValueError("patch: expected a PeftModel around an unpatched model, got a patched one; unpatch that first")
    seq2seq = bool(getattr(reader.config, "is_encoder_decoder", False))
    offered = model_sites(reader.config)
    geometry = offered.geometries["decoder"]
    written = _geometry_of(config)
    # PEFT counts the encoder's layers; what a shorter decoder does not read is ignored.
    longer = seq2seq and written.num_layers > geometry.num_layers
    check_same_geometry(replace(written, num_layers=geometry.num_layers) if longer else written, geometry, "patch")
    selfcheck.vet_model(reader, backend, geometry.head_dim, compute_dtype, with_masters=False)
    positions = admission.admit(reader, offered)
    plan = seq2seq_plan(reader_class) if seq2seq else loss_plan(reader_class)
    state = hosts.HostState.of(
        reader, backend=backend, compute_dtype=compute_dtype, positions=positions, plan=plan, **options
    )
    hosts.step_in(reader, hosts.BorrowingHost, state)
    parts.follow_backbone(reader, True)
    hosts.step_in(model, mixin, PeftState(backend), STATE)
    return model


def _mixin_for(model: Any) -> type[PeftHost]:
    """What a PeftModel of this class does otherwise.

    Raises:
        NotImplementedError: its task and the model inside have no common prefix.
    """
    import peft

    base, submodules = model.base_model, model.active_peft_config.num_transformer_submodules
    if getattr(base.config, "is_encoder_decoder", False):
        if isinstance(model, peft.PeftModelForSeq2SeqLM) and submodules == 2:
            return PeftLanguageModel
        wanted, tasks = "PeftModelForSeq2SeqLM", "SEQ_2_SEQ_LM"
    else:
        mixins = {
            peft.PeftModelForCausalLM: PeftLanguageModel,
            peft.PeftModelForFeatureExtraction: PeftHost,
            peft.PeftModelForSequenceClassification: PeftClassifier,
            peft.PeftModelForTokenClassification: PeftClassifier,
            peft.PeftModelForQuestionAnswering: PeftClassifier,
        }
        for kind, mixin in mixins.items():
            if isinstance(model, kind) and submodules == 1:
                return mixin
        wanted, tasks = "PeftModelForCausalLM", "CAUSAL_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS or FEATURE_EXTRACTION"
    raise NotImplementedError(
        f"patch: expected a {wanted} or another task of {type(base).__name__}, got {type(model).__name__} with"
        f" num_transformer_submodules={submodules}; use task_type {tasks}"
    )


def _reader(model: Any) -> Any:
    """The module that PEFT hands its cache to: the model inside, or the backbone of a head that takes no cache."""
    base = model.base_model
    if "past_key_values" in inspect.signature(base.forward).parameters or not hasattr(model, "_prefix_tuning_forward"):
        return base
    return base.get_submodule(model.transformer_backbone_name)


def unpatch_peft(model: Any) -> Any:
    """`unpatch` for a PeftModel that is patched."""
    reader = _reader(model)
    hosts.step_out(model, STATE)
    parts.follow_backbone(reader, False)
    hosts.step_out(reader)
    sites.unmark(reader)
    hub.leave_attention(reader)
    return model


def is_patched(model: Any) -> bool:
    """Whether the PeftModel is patched."""
    return isinstance(model, PeftHost)


def _geometry_of(config: Any) -> Geometry:
    return Geometry(config.num_layers, config.num_attention_heads, config.token_dim // config.num_attention_heads)


def _is_prefix(config: Any) -> bool:
    """Whether the adapter's prompt is keys and values."""
    return getattr(config.peft_type, "value", config.peft_type) in PEFT_TYPES


def _drop_token_types(model: Any, arguments: dict[str, Any]) -> None:
    """PEFT's own warning and removal, without its shift of the positions."""
    positions = arguments.pop("position_ids", None)
    model._adjust_prompt_learning_kwargs(model.active_peft_config, kwargs=arguments)
    if positions is not None:
        arguments["position_ids"] = positions
