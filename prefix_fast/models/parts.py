"""Parts of a patched model that are called by themselves, and read the prefix then: encoders and backbones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from prefix_fast.models import hosts, hub

OWNER = "_prefix_fast_owner"


class EncoderHost:
    """The encoder of a patched encoder-decoder, which `generate` and users also call by itself: it reads its prefix."""

    _prefix_fast_class: Any

    def _prefix_forward(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if kwargs.get(hub.KEYWORD) is not None:
            return forward(self, *args, **kwargs)
        (owner,) = self.__dict__[OWNER]
        owner._keep_attention()
        arguments = {**dict(zip(hosts.forward_parameters(self), args, strict=False)), **kwargs}
        arguments[hub.KEYWORD] = owner._prefix_context(arguments)
        with owner._compute(next(owner.parameters()).device.type):
            return forward(self, **arguments)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return hosts._rebuild, (self._prefix_fast_class, EncoderHost), self.__dict__


class BackboneHost:
    """The decoder of a patched decoder-only model, which others call by itself, to run a head of their own."""

    _prefix_fast_class: Any

    def _prefix_forward(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get(hub.KEYWORD)
        if given is not None and given.placed:
            return forward(self, *args, **kwargs)
        (owner,) = self.__dict__[OWNER]
        arguments = {**dict(zip(hosts.forward_parameters(self), args, strict=False)), **kwargs}
        return owner._backbone_forward(functools.partial(forward, self), arguments)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return hosts._rebuild, (self._prefix_fast_class, BackboneHost), self.__dict__


def follow_encoder(model: Any, reads: bool) -> None:
    """Let the encoder read its prefix when it is called by itself, or no longer."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    if encoder is None or reads == isinstance(encoder, EncoderHost):
        return
    if reads:
        hosts.step_in(encoder, EncoderHost, (model,), OWNER)
    else:
        hosts.step_out(encoder, OWNER)


def follow_backbone(model: Any, reads: bool) -> None:
    """Let the backbone of a decoder-only model read the prefix when it is called by itself, or no longer."""
    backbone = getattr(model, "base_model", model)
    if model.config.is_encoder_decoder or backbone is model or reads == isinstance(backbone, BackboneHost):
        return
    if reads:
        hosts.step_in(backbone, BackboneHost, (model,), OWNER)
    else:
        hosts.step_out(backbone, OWNER)
