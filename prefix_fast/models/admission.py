"""Which models are let in: the reasons not to patch one, and a trial run that shows the prefix reach each layer.

The trial is one forward of two tokens (of an encoder-decoder, after three source tokens), without gradients, in which
our attention function returns zeros and takes note of who called it with what. A model whose layers do not all call it,
or that hand it something that would change the result and that the operator does not know, is refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from prefix_fast.geometry import ModelSites
from prefix_fast.models import families, hub, sites
from prefix_fast.models.masks import OwnMask

# Keywords of the attention call that the operator knows, and those that change nothing.
_UNDERSTOOD = {"dropout", "scaling", "softcap", "s_aux", "position_bias"}
_WITHOUT_EFFECT = {
    "position_ids", "use_cache", "output_attentions", "output_hidden_states", "sliding_window", "past_key_values",
    "cache_position", "return_dict", "layer_idx", "position_embeddings", "output_router_logits", "past_key_value",
}  # fmt: skip


class Trial:
    """A `PrefixContext` for the trial run: takes note of the calls."""

    length = 0

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, int]] = []  # module, number of keys
        self.shapes: list[tuple[int, int, int]] = []
        self.biased: set[nn.Module] = set()
        self.unknown: set[str] = set()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Zeros in the shape of the attention's output."""
        self.calls.append((module, key.shape[2]))
        self.shapes.append((key.shape[1], key.shape[3], value.shape[3]))
        bias = kwargs.get("position_bias")
        if bias is not None and bool(bias.any()):
            self.biased.add(module)
        given = {name for name, argument in kwargs.items() if argument is not None and argument is not False}
        self.unknown |= given - _UNDERSTOOD - _WITHOUT_EFFECT
        batch, heads, tokens, _ = query.shape
        return value.new_zeros(batch, tokens, heads, value.shape[3]), None


def check_model(model: Any) -> None:
    """Raise unless the object is a transformers model for text or speech on one device.

    Raises:
        TypeError: no transformers model. NotImplementedError: one that cannot be patched, with the reason.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"patch: expected a transformers model or a PeftModel, got {type(model).__name__}; load one with"
            " AutoModelForCausalLM.from_pretrained"
        )
    name, config = type(model).__name__, model.config
    if config.get_text_config() is not config:
        raise NotImplementedError(
            f"patch: expected a text model, got {name}, which joins several; patch its language model where it has one"
        )
    if not getattr(config, "is_causal", True):
        raise NotImplementedError(f"patch: expected a causal model, got {name} with is_causal=False")
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    devices |= {str(parameter.device) for parameter in model.parameters()}
    devices = {"cuda:" + device if device.isdigit() else device for device in devices}
    if len(devices) > 1:
        raise NotImplementedError(
            f"patch: expected a model on one device, got {name} on {sorted(devices)}; load it with a device_map of one"
            " device"
        )
    if devices == {"meta"}:
        raise NotImplementedError(f"patch: expected a model with weights, got {name} on the meta device; load it first")


def admit(model: Any, offered: ModelSites) -> str:
    """Point the model's config at our attention and see that the prefix reaches its layers.

    Returns:
        How the model counts positions (see `families`).

    Raises:
        NotImplementedError: the model cannot be patched, with the reason. ValueError: it runs reentrant
            checkpointing, or a part of it is patched. Its config is then as it was.
    """
    _check_checkpointing(model)
    if sites.is_marked(model):
        raise ValueError(
            f"patch: expected a model of which no part is patched, got {type(model).__name__}; patch the model that is"
            " patched already, or unpatch it first"
        )
    hub.enter_attention(model)
    try:
        positions = _checked_positions(model)
        if offered.is_encoder_decoder:
            sites.follow_positions(model, positions)
        _run_trial(model, offered, positions)
    except BaseException:
        sites.unmark(model)
        hub.leave_attention(model)
        raise
    return positions


def _check_checkpointing(model: Any) -> None:
    """Raise ValueError if the model already runs reentrant gradient checkpointing."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "patch: expected gradient checkpointing with use_reentrant=False, got True, under which the prefix"
                    " gets no gradient; call gradient_checkpointing_enable() again without it"
                )


def _checked_positions(model: Any) -> str:
    """How the model counts positions.

    Raises:
        NotImplementedError: it takes no positions, or counts them in a way that we do not know.
    """
    style = families.position_style(model)
    if getattr(model.config, "is_encoder_decoder", False):
        if style is None:
            raise NotImplementedError(
                f"patch: expected an encoder-decoder of one of the types {', '.join(sorted(families.SEQ2SEQ_STYLES))},"
                f" got {type(model).__name__} of type {model.config.model_type!r}, for which no test shows that its"
                " positions and attention are those of a prefix before its tokens"
            )
        return style
    if style is None or "position_ids" not in inspect.signature(model.forward).parameters:
        raise NotImplementedError(
            f"patch: expected a model whose positions can be shifted by the prefix, got {type(model).__name__}, whose"
            " positions are not arange from the past length; it cannot be patched"
        )
    return style


def _run_trial(model: Any, offered: ModelSites, positions: str) -> None:
    """Run a few tokens through the model, whose config already has our attention's name.

    Raises:
        NotImplementedError: not every layer calls our attention function with the prefix, or one hands it something
            that the operator does not know, or has keys and values of other shapes.
    """
    trial = Trial()
    name = type(model).__name__
    training = [module for module in model.modules() if module.training]
    if offered.is_encoder_decoder:
        inputs = sites.trial_inputs(model, source=3, target=2)
    else:
        device = model.device
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device)}
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            model(**inputs, use_cache=False, **{hub.KEYWORD: trial})
    except (TypeError, AttributeError) as error:
        if hub.KEYWORD not in str(error) and OwnMask.__name__ not in str(error):
            raise
        raise NotImplementedError(
            f"patch: expected a forward that hands keywords and masks down to the attention as they are, got {name},"
            f" which does not: {error}; it cannot be patched"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NotImplementedError(
            f"patch: expected a model that takes token ids [B, T], got {name}, which fails on two of them: {error}; it"
            " cannot be patched"
        ) from error
    except IndexError as error:
        if not offered.is_encoder_decoder:
            raise
        raise NotImplementedError(
            f"patch: expected a model that takes target tokens of another number than its source tokens, got {name}, as"
            " classifiers of sequences are; they cannot be patched, patch the model inside"
        ) from error
    finally:
        for module in training:
            module.training = True
    if offered.is_encoder_decoder:
        _check_sites(model, trial, offered, positions)
    else:
        _check_layers(name, trial, offered)
    if trial.unknown:
        raise NotImplementedError(
            f"patch: expected attention of queries, keys, values and a mask, got {name}, which also uses"
            f" {sorted(trial.unknown)}; it cannot be patched"
        )


def _check_layers(name: str, trial: Trial, offered: ModelSites) -> None:
    """Raise unless each layer of a decoder-only model called once, with keys and values of the geometry."""
    geometry = offered.geometries["decoder"]
    layers = [getattr(module, "layer_idx", None) for module, _ in trial.calls]
    missing = sorted(set(range(geometry.num_layers)) - {layer for layer in layers if layer is not None})
    if missing or len(layers) != geometry.num_layers:
        raise NotImplementedError(
            f"patch: expected the prefix to reach each of {name}'s {geometry.num_layers} layers once, got layers"
            f" {layers}; its attention does not go through transformers' attention interface"
        )
    if set(trial.shapes) != {(geometry.num_kv_heads, geometry.head_dim, geometry.head_dim)}:
        raise NotImplementedError(
            f"patch: expected keys and values of {geometry.num_kv_heads} heads of {geometry.head_dim} in every layer of"
            f" {name}, got (heads, key dim, value dim) {sorted(set(trial.shapes))}; it cannot be patched"
        )
    if trial.biased:
        raise NotImplementedError(
            f"patch: expected attention without a position bias, got {name}; which bias its prefix would have is not"
            " known, it cannot be patched"
        )


def _check_sites(model: Any, trial: Trial, offered: ModelSites, positions: str) -> None:
    """Mark the attention modules, and raise unless each site's layers called once, as the geometries say."""
    name = type(model).__name__
    found = sites.mark(model, trial.calls, source=_source_length(model))
    wanted = {site: geometry.num_layers for site, geometry in offered.geometries.items()}
    if found != wanted or len({module for module, _ in trial.calls}) < len(trial.calls):
        raise NotImplementedError(
            f"patch: expected the prefix to reach each attention of {name} once, {wanted}, got {found}; not all of its"
            " attention goes through transformers' attention interface"
        )
    for (module, _), shape in zip(trial.calls, trial.shapes, strict=True):
        site = sites.site_of(module)
        geometry = offered.geometries[site.name]
        if shape != (geometry.num_kv_heads, geometry.head_dim, geometry.head_dim):
            raise NotImplementedError(
                f"patch: expected keys and values of {geometry.num_kv_heads} heads of {geometry.head_dim} at the site"
                f" {site.name!r} of {name}, got (heads, key dim, value dim) {shape}; it cannot be patched"
            )
        if (site.bias is not None and positions != "relative") or (site.bias is None and module in trial.biased):
            raise NotImplementedError(
                f"patch: expected a position bias from compute_bias in the self-attention alone, got {name}, which has"
                f" another at the site {site.name!r}; it cannot be patched"
            )


def _source_length(model: Any) -> int:
    """The encoder's tokens in a trial run."""
    return model.config.max_source_positions if model.main_input_name == "input_features" else 3
