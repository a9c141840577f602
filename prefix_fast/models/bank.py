"""A patched model whose rows choose from a PrefixBank, with the keyword `prefix_ids` of forward and generate."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prefix_fast.models import hosts, hub

KEYWORD = "prefix_ids"
# What has a row for each row of the decoder's tokens; an encoder-decoder's, in this order.
_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "input_features", "inputs")


class BankHost(hosts.PrefixHost):
    """A model with a PrefixBank in `model.prefix`; each call says which row reads which of its entries."""

    _prefix_fast_keywords = (KEYWORD,)

    def _prefix_context(self, arguments: dict[str, Any]) -> hub.PrefixContext:
        state: hosts.HostState = self.__dict__[hosts.STATE]
        prefix_ids, rows = arguments.pop(KEYWORD, None), _rows(arguments)
        if prefix_ids is not None:
            states, choice = self.prefix(prefix_ids, rows)  # type: ignore[attr-defined]
        elif state.states is None:
            raise ValueError(
                f"{type(self).__name__}: expected prefix_ids, with a name, a position or None (in a tensor -1) for each"
                f" row, got none; the bank has {self.prefix.names}"  # type: ignore[attr-defined]
            )
        else:
            states, choice = state.states, state.choice
            if choice is not None and rows is not None:
                choice = _of_rows(choice, rows)
        return hub.PrefixContext(states, state.backend, choice=choice)

    @contextmanager
    def _generating(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        state: hosts.HostState = self.__dict__[hosts.STATE]
        before = state.choice
        given = {"inputs": args[0], **kwargs} if args else kwargs
        prefix_ids = kwargs.pop(KEYWORD, None)
        if prefix_ids is None:
            raise ValueError(
                f"{type(self).__name__}.generate: expected prefix_ids, with a name, a position or None (in a tensor -1)"
                f" for each row, got none; the bank has {self.prefix.names}"  # type: ignore[attr-defined]
            )
        with torch.no_grad():
            states, choice = self.prefix(prefix_ids, _rows(given))  # type: ignore[attr-defined]
        names = () if choice is None else choice.names
        with self.prefix.in_use(names), hosts.once_per_generation(state, lambda: states):  # type: ignore[attr-defined]
            state.choice = choice
            try:
                yield
            finally:
                state.choice = before


def _rows(arguments: dict[str, Any]) -> int | None:
    """B of a call; None: it brings nothing that says."""
    for name in _INPUTS:
        if isinstance(arguments.get(name), Tensor):
            return arguments[name].shape[0]
    encoded = arguments.get("encoder_outputs")
    return None if encoded is None else encoded[0].shape[0]


def _of_rows(choice: Any, rows: int) -> Any:
    """The choice of a running generation's batch, whose rows may stand several times in succession."""
    given = choice.ids.shape[0]
    if rows % given:
        raise ValueError(
            f"prefix_ids: expected a multiple of the {given} rows that generate was called with, got {rows}; this way"
            " of generating cannot choose from a bank"
        )
    return choice.repeated(rows // given)
