"""PEFT models with prefix tuning: the prompt encoder's keys and values reach the layers without PEFT's cache.

PEFT repeats the prefix for every row, hands it over as the past of the cache, lengthens the padding mask and shifts the
positions. Here the PeftModel's forward and prepare_inputs_for_generation hand the model inside one `PrefixContext`
instead, which shifts the positions by itself. Parameters, configs, adapters and files are PEFT's own and stay
untouched; `disable_adapter` works because it calls the model inside without a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefix_fast import selfcheck
from prefix_fast.geometry import Geometry, check_same_geometry, model_geometry, split_flat
from prefix_fast.models import admission, hosts, hub
from prefix_fast.models.loss import loss_plan

STATE = "_prefix_fast_peft"


@dataclass
class PeftState:
    """What a patched PeftModel remembers: the operator's backend, and what a running `generate` computed once."""

    backend: str
    states: hosts.States | None = field(default=None, repr=False)


class PeftHost:
    """What a patched PeftModelForCausalLM does otherwise than its class, while a prefix-tuning adapter is active."""

    _prefix_fast_class: Any

    def _prefix_forward(self: Any, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not _is_prefix_tuning(self.active_peft_config):
            return forward(self, *args, **kwargs)
        names = ("input_ids", "attention_mask", "inputs_embeds", "labels", "output_attentions", "output_hidden_states")
        arguments = {**dict(zip((*names, "return_dict", "task_ids"), args, strict=False)), **kwargs}
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


def prompt_states(model: Any) -> hosts.States:
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
    return keys.unsqueeze(1), values.unsqueeze(1)


def patch_peft(model: Any, backend: str, fused_loss: bool, compute_dtype: torch.dtype | None) -> Any:
    """`patch` for a PeftModel.

    Raises:
        NotImplementedError: another task or adapter than prefix tuning of a causal language model, or a model inside
            that cannot be patched. ValueError: an adapter of other shapes than the model's, a model inside that is
            patched.
    """
    from peft import PeftModelForCausalLM

    config = model.active_peft_config
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not _is_prefix_tuning(config):
        raise NotImplementedError(
            f"patch: expected a PeftModel whose active adapter is prefix tuning, got {kind}; its prompt is no prefix of"
            " keys and values"
        )
    if not isinstance(model, PeftModelForCausalLM) or config.num_transformer_submodules != 1:
        raise NotImplementedError(
            f"patch: expected a PeftModelForCausalLM, got {type(model).__name__}; use task_type='CAUSAL_LM'"
        )
    base = model.base_model
    base_class: Any = type(base)
    admission.check_model(base)
    if hosts.is_patched(base):
        raise ValueError("patch: expected a PeftModel around an unpatched model, got a patched one; unpatch that first")
    geometry = model_geometry(base.config)
    check_same_geometry(_geometry_of(config), geometry, "patch")
    selfcheck.vet_model(base, backend, geometry.head_dim, compute_dtype, with_masters=False)
    positions = admission.admit(base, geometry)
    plan = loss_plan(base_class)
    state = hosts.HostState.of(base, backend, fused_loss, compute_dtype, positions=positions, plan=plan)
    hosts.step_in(base, hosts.BorrowingHost, state)
    hosts.step_in(model, PeftHost, PeftState(backend), STATE)
    return model


def unpatch_peft(model: Any) -> Any:
    """`unpatch` for a PeftModel that is patched."""
    hosts.step_out(model, STATE)
    hosts.step_out(model.base_model)
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
