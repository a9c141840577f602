"""`patch` and `unpatch`: give a model a prefix, and take it away again without a trace."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from prefix_fast import dispatch, half, selfcheck
from prefix_fast.bank import PrefixBank
from prefix_fast.bank_files import holds_bank
from prefix_fast.geometry import model_sites
from prefix_fast.models import admission, families, hosts, hub, last_layer, linears, parts, sites
from prefix_fast.models.bank import BankHost
from prefix_fast.models.loss import loss_plan
from prefix_fast.models.seq2seq_loss import seq2seq_plan
from prefix_fast.prefix import Prefix, PrefixConfig


def patch(
    model: Any,
    prefix: int | str | PathLike[str] | PrefixConfig | Prefix | PrefixBank | None = None,
    *,
    backend: str = "auto",
    freeze: bool = True,
    fused_loss: bool = True,
    padding_free: bool = True,
    trim_last_layer: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> Any:
    """Give a model a prefix: keys and values in every layer that all tokens attend to, outside the key/value cache.

    A model that is patched already gets the new prefix instead of the old one. If anything raises, the model is as it
    was. On a GPU the Triton kernels that the model needs are first checked against the oracle, once for each card and
    driver (see `prefix_fast.selfcheck`); a model that is moved there later is checked by its first call.

    Args:
        model: a transformers model, decoder-only, encoder-only or encoder-decoder, or a PeftModel whose active adapter
            is prefix tuning or a cartridge (of any task; of an encoder-decoder SEQ_2_SEQ_LM): its own adapter is the
            prefix, and parameters, files, losses and tokens stay PEFT's.
        prefix: None: a fresh `PrefixConfig()`; an int: that many virtual tokens (0: no prefix); a PrefixConfig; a
            Prefix; a folder or Hub id; a PrefixBank or the folder of one: every forward and generate then takes
            `prefix_ids`, for each row the name of an entry or None, or a tensor of positions in `bank.names`, -1 for
            none. None for a PeftModel.
        backend: of the operator, as in `prefix_attention`.
        freeze: freeze the language model; `model.prefix` is then the only trainable module, and the only one saved.
        fused_loss: with labels in training mode, run head and loss on the labelled positions only; the output's
            `logits` are computed when first read (None under torch.compile).
        padding_free: with the fused loss, leave out of the computation what is padding and predicts no label (its
            logits are those of a zero hidden state): in decoder-only models, and in sources and targets of
            encoder-decoders with learned or sinusoidal positions. Several texts in one row of a decoder-only model, as
            transformers' DataCollatorWithFlattening makes them, are kept apart without a mask of all pairs. Where a
            layer's attention does not allow it, padding is computed.
        trim_last_layer: with `padding_free`, compute in the last layer keys and values of all tokens, and the rest of
            the tokens between a row's first and last label alone. Logits that are read then cost a second forward;
            from the next call on the last layer computes everything.
        compute_dtype: run every forward under autocast of this dtype, bfloat16 or float16, beside a float32 prefix. The
            weights stay as they are; those of frozen linear layers are copied once and not in every forward, which
            takes half of their memory more until `unpatch`; under FSDP2, whose weights are shards, give its
            MixedPrecisionPolicy the dtype instead. None: as called.

    Returns:
        The same model.

    Raises:
        TypeError: an argument of another type. ValueError: a prefix for another model, an unknown backend, arguments
            that contradict each other. NotImplementedError: a model that cannot be patched, with the reason.
    """
    _check_options(backend, compute_dtype, model)
    options: dict[str, Any] = {
        "backend": backend,
        "fused_loss": fused_loss,
        "packs": padding_free,
        "trims": trim_last_layer,
        "compute_dtype": compute_dtype,
    }
    if _is_peft(model):
        from prefix_fast.models import peft

        if prefix is not None or not freeze:
            raise ValueError(
                "patch: expected neither prefix nor freeze=False for a PeftModel, whose active adapter is the prefix"
                " and says what is trained; leave them out"
            )
        if peft.is_patched(model):
            unpatch(model)
        peft.patch_peft(model, **options)
        linears.step_in(model.base_model, compute_dtype)
        last_layer.step_in(model.base_model)
        return model

    admission.check_model(model)
    was = _earlier_state(model)
    own_class: Any = type(model)
    offered = model_sites(model.config)
    module = _prefix_module(prefix, model)
    for head_dim in {geometry.head_dim for geometry in offered.geometries.values()}:
        selfcheck.vet_model(model, backend, head_dim, compute_dtype, with_masters=module is not None)
    relative = families.position_style(model) == "relative"
    if relative and isinstance(module, Prefix) and not module.shifts_positions:
        raise NotImplementedError(
            f"patch: expected a prefix that shifts positions with {type(model).__name__}, whose attention has a bias by"
            " distance, got one that does not; it cannot be patched"
        )
    if not freeze and relative:
        raise NotImplementedError(
            f"patch: expected freeze=True, got False with {type(model).__name__}, whose position bias would need a"
            " gradient that the operator does not give; train the prefix alone"
        )
    if was is None:
        positions = admission.admit(model, offered)
        plan = seq2seq_plan(own_class) if offered.is_encoder_decoder else loss_plan(own_class)
    else:
        positions, plan = was.positions, was.plan
        _restore_grad(model, was)
    frozen = _freeze(model) if freeze else None
    state = hosts.HostState.of(model, positions=positions, plan=plan, requires_grad=frozen, **options)
    if module is not None:
        module.to(model.device).train(model.training)
    model.register_module("prefix", module)
    if isinstance(module, PrefixBank):
        module.bind(offered)
    if was is not None:
        hosts.step_out(model)
    hosts.step_in(model, BankHost if isinstance(module, PrefixBank) else hosts.PrefixHost, state)
    if offered.is_encoder_decoder:
        parts.follow_encoder(model, module is not None and "encoder" in module.sites)
    linears.step_in(model, compute_dtype)
    if not offered.is_encoder_decoder:
        last_layer.step_in(model)
        parts.follow_backbone(model, True)
    return model


def unpatch(model: Any) -> Any:
    """Take the prefix away: class, forward, attention, `requires_grad` are as they were before `patch`.

    Args:
        model: what `patch` returned.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not patched.
    """
    if _is_peft(model):
        from prefix_fast.models import peft

        if peft.is_patched(model):
            linears.step_out(model.base_model)
            return peft.unpatch_peft(model)
    elif hosts.is_patched(model) and isinstance(model, hosts.PrefixHost):
        return _leave(model)
    raise ValueError(f"unpatch: expected a model that patch returned, got {type(model).__name__}; patch it first")


def _leave(model: Any) -> Any:
    linears.step_out(model)
    parts.follow_encoder(model, False)
    parts.follow_backbone(model, False)
    state = hosts.step_out(model)
    sites.unmark(model)
    hub.leave_attention(model)
    _restore_grad(model, state)
    del model._modules["prefix"]
    return model


def _earlier_state(model: Any) -> hosts.HostState | None:
    """What an earlier patch left on the model; None: it is not patched."""
    if hosts.is_patched(model):
        if not isinstance(model, hosts.PrefixHost):
            raise ValueError("patch: expected the PeftModel around this patched model; patch or unpatch that one")
        return model.__dict__[hosts.STATE]
    if hasattr(model, "prefix"):
        raise NotImplementedError(
            f"patch: expected a model without an attribute `prefix`, got {type(model).__name__}; it cannot be patched"
        )
    return None


def _freeze(model: Any) -> dict[str, bool]:
    """Freeze all but the prefix; returns what `requires_grad` was, by name."""
    before = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("prefix."):
            before[name] = parameter.requires_grad
            parameter.requires_grad_(False)
    return before


def _restore_grad(model: Any, state: hosts.HostState) -> None:
    parameters = dict(model.named_parameters())
    for name, requires_grad in (state.requires_grad or {}).items():
        if name in parameters:
            parameters[name].requires_grad_(requires_grad)


def _prefix_module(prefix: Any, model: Any) -> Prefix | PrefixBank | None:
    kinds = (int, str, PathLike, PrefixConfig, Prefix, PrefixBank, type(None))
    if isinstance(prefix, bool) or not isinstance(prefix, kinds):
        raise TypeError(
            "patch: expected prefix to be None, an int, a PrefixConfig, a Prefix, a PrefixBank, a folder or a Hub"
            f" id, got {type(prefix).__name__}; pass one of these"
        )
    if isinstance(prefix, int):
        if prefix < 0:
            raise ValueError(f"patch: expected prefix >= 0 virtual tokens, got {prefix}; pass 0 for none")
        if prefix == 0:
            return None
        prefix = PrefixConfig(num_virtual_tokens=prefix)
    if holds_bank(prefix):
        return PrefixBank.from_pretrained(prefix, model_config=model.config)
    if isinstance(prefix, (str, PathLike)):
        return Prefix.from_pretrained(prefix, model_config=model.config)
    if isinstance(prefix, (Prefix, PrefixBank)):
        prefix.check_fits(model.config)
        return prefix
    return Prefix(prefix or PrefixConfig(), model.config)


def _check_options(backend: str, compute_dtype: torch.dtype | None, model: Any) -> None:
    if backend not in dispatch.NAMES:
        raise ValueError(f"patch: expected backend to be one of {', '.join(dispatch.NAMES)}, got {backend!r}")
    reasons = [info.reason for info in dispatch.backends() if info.name == backend and not info.available]
    if reasons:
        raise NotImplementedError(f"patch: expected a backend that can run here, got {backend!r}: {reasons[0]}")
    if compute_dtype not in (None, *half.DTYPES):
        raise TypeError(
            f"patch: expected compute_dtype to be torch.bfloat16 or torch.float16, got {compute_dtype}; leave it out to"
            " compute in the model's own dtype"
        )
    if compute_dtype is not None and isinstance(model, torch.nn.Module):
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        if device.type != "cpu" or not torch.cuda.is_available():  # from there it can still go to the GPU
            half.check("patch", device, compute_dtype)


def _is_peft(model: Any) -> bool:
    """Whether the model is a PeftModel, without importing PEFT for the question."""
    return any(cls.__module__.startswith("peft.") and cls.__name__ == "PeftModel" for cls in type(model).__mro__)
