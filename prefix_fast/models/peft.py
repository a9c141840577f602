"""PEFT models with prefix tuning: the prompt encoder's keys and values reach the layers without PEFT's cache.

Of an encoder-decoder PEFT fills the decoder's self-attention alone, whose layer l gets the prefix's layer 2l mod L.

PEFT repeats the prefix for every row, hands it over as the past of the cache, lengthens the padding mask and shifts the
positions. Here the PeftModel's forward and prepare_inputs_for_generation hand the model inside one `PrefixContext`
instead, which shifts the positions by itself. Parameters, configs, adapters and files are PEFT's own and stay
untouched; `disable_adapter` works because it calls the model inside without a prefix.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prefix_fast import selfcheck
from prefix_fast.geometry import Geometry, check_same_geometry, model_sites, peft_layers, split_flat
from prefix_fast.models import admission, hosts, hub, sites
from prefix_fast.models.loss import loss_plan
from prefix_fast.models.seq2seq_loss import seq2seq_plan

STATE = "_prefix_fast_peft"


@dataclass
class PeftState:
    """What a patched PeftModel remembers: the operator's backend, and what a running `generate` computed once."""

    backend: str
    states: hub.States | None = field(default=None, repr=False)


class PeftHost:
    """What a patched PeftModelForCausalLM or PeftModelForSeq2SeqLM does otherwise, while prefix tuning is active."""

    _prefix_fast_class: Any

    def _prefix_forward(self: Any, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not _is_prefix_tuning(self.active_peft_config):
            return forward(self, *args, **kwargs)
        arguments = {**dict(zip(_names(self._prefix_fast_class), args, strict=False)), **kwargs}
        # As in PEFT: whatever cache the caller has, the prefix is the past.
        for name in ("past_key_values", "task_ids"):
            arguments.pop(name, None)
        if arguments.get("position_ids") is not None and arguments.get("attention_mask") is None:
            # A cache in PEFT's place keeps transformers from reading restarting positions as several texts in a row.
            arguments["attention_mask"] = torch.ones_like(arguments["position_ids"])
        _drop_token_types(self, arguments)
        return self.base_model(**arguments, **{hub.KEYWORD: self._prefix_context()})

    def prepare_inputs_for_generation(self: Any, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The inputs of the model inside, with the prefix beside them."""
        if not _is_prefix_tuning(self.active_peft_config):
            return super().prepare_inputs_for_generation(*args, task_ids=task_ids, **kwargs)  # type: ignore[misc]
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        _drop_token_types(self, inputs)
        inputs[hub.KEYWORD] = self._prefix_context()
        return inputs

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in PEFT; the prefix's keys and values are computed once, not at every token."""
        if not _is_prefix_tuning(self.active_peft_config):
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        with hosts.once_per_generation(self.__dict__[STATE], lambda: prompt_states(self)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _prefix_context(self: Any) -> hub.PrefixContext:
        state: PeftState = self.__dict__[STATE]
        states = prompt_states(self) if state.states is None else state.states
        return hub.PrefixContext(states, state.backend, in_window=True)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return hosts._rebuild, (self._prefix_fast_class, PeftHost), self.__dict__


@functools.cache
def _names(cls: Any) -> tuple[str, ...]:
    """The names of a forward's arguments, in order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def prompt_states(model: Any) -> hub.States:
    """The active adapter's keys and values, [L, 1, Hkv, P, D] each, as `PeftModel.get_prompt` takes them for one row.

    Equal to it in everything else: the encoder's training mode, `inference_mode`, the cast to the model's dtype.
    """
    config = model.active_peft_config
    encoder = model.prompt_encoder[model.active_adapter]
    if config.inference_mode:
        flat = encoder.embedding.weight
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


def patch_peft(model: Any, backend: str, fused_loss: bool, compute_dtype: torch.dtype | None) -> Any:
    """`patch` for a PeftModel.

    Raises:
        NotImplementedError: another task or adapter than prefix tuning of a causal or sequence-to-sequence language
            model, or a model inside that cannot be patched. ValueError: an adapter of other shapes than the model's, a
            model inside that is patched.
    """
    from peft import PeftModelForCausalLM, PeftModelForSeq2SeqLM

    config = model.active_peft_config
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not _is_prefix_tuning(config):
        raise NotImplementedError(
            f"patch: expected a PeftModel whose active adapter is prefix tuning, got {kind}; its prompt is no prefix of"
            " keys and values"
        )
    base = model.base_model
    seq2seq = bool(getattr(base.config, "is_encoder_decoder", False))
    wanted = PeftModelForSeq2SeqLM if seq2seq else PeftModelForCausalLM
    if not isinstance(model, wanted) or config.num_transformer_submodules != 1 + seq2seq:
        raise NotImplementedError(
            f"patch: expected a {wanted.__name__}, got {type(model).__name__} with num_transformer_submodules="
            f"{config.num_transformer_submodules}; use task_type='{'SEQ_2_SEQ_LM' if seq2seq else 'CAUSAL_LM'}' for"
            f" {type(base).__name__}"
        )
    base_class: Any = type(base)
    admission.check_model(base)
    if hosts.is_patched(base):
        raise ValueError("patch: expected a PeftModel around an unpatched model, got a patched one; unpatch that first")
    offered = model_sites(base.config)
    geometry = offered.geometries["decoder"]
    written = _geometry_of(config)
    # PEFT counts the encoder's layers; what a shorter decoder does not read is ignored.
    longer = seq2seq and written.num_layers > geometry.num_layers
    check_same_geometry(replace(written, num_layers=geometry.num_layers) if longer else written, geometry, "patch")
    selfcheck.vet_model(base, backend, geometry.head_dim, compute_dtype, with_masters=False)
    positions = admission.admit(base, offered)
    plan = seq2seq_plan(base_class) if seq2seq else loss_plan(base_class)
    state = hosts.HostState.of(base, backend, fused_loss, compute_dtype, positions=positions, plan=plan)
    hosts.step_in(base, hosts.BorrowingHost, state)
    hosts.step_in(model, PeftHost, PeftState(backend), STATE)
    return model


def unpatch_peft(model: Any) -> Any:
    """`unpatch` for a PeftModel that is patched."""
    hosts.step_out(model, STATE)
    hosts.step_out(model.base_model)
    sites.unmark(model.base_model)
    hub.leave_attention(model.base_model)
    return model


def is_patched(model: Any) -> bool:
    """Whether the PeftModel is patched."""
    return isinstance(model, PeftHost)


def _geometry_of(config: Any) -> Geometry:
    return Geometry(config.num_layers, config.num_attention_heads, config.token_dim // config.num_attention_heads)


def _is_prefix_tuning(config: Any) -> bool:
    return getattr(config.peft_type, "value", config.peft_type) == "PREFIX_TUNING"


def _drop_token_types(model: Any, arguments: dict[str, Any]) -> None:
    """PEFT's own warning and removal, without its shift of the positions."""
    positions = arguments.pop("position_ids", None)
    model._adjust_prompt_learning_kwargs(model.active_peft_config, kwargs=arguments)
    if positions is not None:
        arguments["position_ids"] = positions
