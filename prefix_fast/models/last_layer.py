"""The last layer of a training step computes only the tokens between a row's first label and its last one.

    keys, values              of all tokens, since the computed ones see them
    queries, MLP, norms       of the needed tokens; the hidden states of the others, which no label reads, are zeros

No layer's code is copied: its own forward runs on the tokens that are not needed until it asks for attention, which
takes their keys and values and ends it there, and then on the needed ones, whose attention reads the keys of both.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prefix_fast import linears
from prefix_fast.models import hosts, hub
from prefix_fast.models.packed import LastTokens, PackedContext
from prefix_fast.models.stepped import Stepped


class LastLayer(Stepped):
    """A decoder layer that computes what is needed of packed rows."""

    def _prefix_forward(self: Any, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        context = kwargs.get(hub.KEYWORD)
        last = getattr(context.rows, "last", None) if isinstance(context, PackedContext) else None
        if last is None:
            return forward(self, *args, **kwargs)

        def run(places: Tensor, attention: Any) -> Any:
            def part(value: Any) -> Any:
                per_token = isinstance(value, Tensor) and value.shape[:2] == (1, len(last.order))
                return value.index_select(1, places) if per_token else value

            given, named = tree_map(part, (args, {**kwargs, hub.KEYWORD: None}))
            return forward(self, *given, **{**named, hub.KEYWORD: attention})

        try:
            run(last.rest, _KeysAlone())
        except _FoundKeys as found:
            rest = found.key, found.value  # the exception itself would keep what the layer had computed
        else:
            name = type(self).__name__
            raise RuntimeError(f"{name}: expected attention in the last layer, got none; patch the model again")
        return tree_map(last.spread, run(last.needed, _NeededQueries(context, last, *rest)))  # type: ignore[arg-type]


class _FoundKeys(Exception):  # noqa: N818 - a signal within this module
    """Ends a layer where its attention would begin."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key = key
        self.value = value


class _KeysAlone:
    """In the place of a context: attention is not computed."""

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> NoReturn:
        """Hand on the keys and values [1, Hkv, rest, D]."""
        raise _FoundKeys(key, value)


class _NeededQueries:
    """In the place of a context: the needed queries read the keys of all tokens."""

    def __init__(self, context: PackedContext, last: LastTokens, rest_key: Tensor, rest_value: Tensor) -> None:
        self.context = PackedContext(context.prefix, last.rows, context.kept)
        self.last = last
        self.rest_key = rest_key
        self.rest_value = rest_value

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention of the needed tokens [1, H, needed, D]."""
        key, value = self.last.joined(key, self.rest_key), self.last.joined(value, self.rest_value)
        return self.context.attend(module, query, key, value, mask, **options)


def step_in(model: nn.Module) -> None:
    """Let the last layer of a patched decoder-only model compute what is needed, where it is found."""
    layer = _last_layer(model)
    if layer is not None and not linears.is_watched(layer) and not hosts.is_patched(layer):
        own_class: Any = type(layer)
        layer.__class__ = hosts.patched_class(own_class, LastLayer)


def _last_layer(model: Any) -> nn.Module | None:
    """None: the layers are not one list, in the order of their attention."""
    count = getattr(model.config, "num_hidden_layers", 0)
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and 0 < len(stack) == count:
            indices = {getattr(module, "layer_idx", None) for module in stack[-1].modules()} - {None}
            if indices == {count - 1}:
                return stack[-1]
    return None
