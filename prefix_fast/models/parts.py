"""Parts of a patched model that are called by themselves, and read the prefix then: encoders and backbones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from prefix_fast.models import hosts, hub

OWNER = "_prefix_fast_owner"


class Part(hosts.SteppedAside):
    """A part that has to find the patched model that it is part of, its owner."""

    @property
    def _owner(self) -> Any:
        (owner,) = self.__dict__[OWNER]
        return owner

    def _named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(hosts.forward_parameters(self), args, strict=False)), **kwargs}


class EncoderHost(Part):
    """The encoder of a patched encoder-decoder, which `generate` and users also call by itself: it reads its prefix."""

    def _prefix_forward(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if kwargs.get(hub.KEYWORD) is not None:
            return forward(self, *args, **kwargs)
        owner, arguments = self._owner, self._named(args, kwargs)
        owner._keep_attention()
        arguments[hub.KEYWORD] = owner._prefix_context(arguments)
        with owner._compute(next(owner.parameters()).device.type):
            return forward(self, **arguments)


class BackboneHost(Part):
    """The decoder of a patched decoder-only model, which others call by itself, to run a head of their own."""

    def _prefix_forward(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get(hub.KEYWORD)
        if given is not None and given.placed:
            return forward(self, *args, **kwargs)
        return self._owner._backbone_forward(functools.partial(forward, self), self._named(args, kwargs))


def follow_encoder(model: Any, reads: bool) -> None:
    """Let the encoder read its prefix when it is called by itself, or no longer."""
    if model.config.is_encoder_decoder:
        _follow(model, model.get_encoder(), EncoderHost, reads)


def follow_backbone(model: Any, reads: bool) -> None:
    """Let the backbone of a decoder-only model read the prefix when it is called by itself, or no longer."""
    backbone = getattr(model, "base_model", model)
    if not model.config.is_encoder_decoder and backbone is not model:
        _follow(model, backbone, BackboneHost, reads)


def _follow(model: Any, part: Any, mixin: type[Part], reads: bool) -> None:
    if part is None or reads == isinstance(part, mixin):
        return
    if reads:
        hosts.step_in(part, mixin, (model,), OWNER)
    else:
        hosts.step_out(part, OWNER)
