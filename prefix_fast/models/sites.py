"""Encoder-decoders: which attention reads which site's prefix, and how the decoder's positions move past its prefix.

A trial run of three source and two target tokens tells the sites apart: modules of the encoder are "encoder"; of the
others, those that see three keys are "cross" and those that see two are "decoder". Every attention module gets a mark
in its `__dict__`, so that copies and pickles keep it.

    "embedded"   decoder.embed_positions(..., past_key_values_length, position_ids): called with positions P further on;
                 of packed tokens the encoder's and the decoder's are called with the place of each in its row
    "relative"   a bias by distance, which the prefix gets too, as the P positions before the row's own:
                 compute_bias(Tq, P, past + P)  [1, H, Tq, P]
"""

from __future__ import annotations

import functools
import inspect
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefix_fast.choice import Choice
from prefix_fast.geometry import SITES
from prefix_fast.models import families

MARK = "_prefix_fast_site"
SHIFT = "_prefix_fast_shift"
PLACES = "_prefix_fast_places"


class Site(NamedTuple):
    """What an attention module reads: the prefix's `layer` at the site `name`.

    Attributes:
        bias: the module whose `compute_bias` gives this one's relative bias; None: its attention has none.
    """

    name: str
    layer: int
    bias: nn.Module | None = None


def site_of(module: nn.Module) -> Site:
    """The site of an attention module; of one in a decoder-only model, its layer.

    Raises:
        RuntimeError: a module that came into an encoder-decoder after it was patched.
    """
    marked = module.__dict__.get(MARK)
    if marked is not None:
        return marked
    if getattr(module.config, "is_encoder_decoder", False):
        raise RuntimeError(
            f"prefix_fast: expected the attention modules that the model had when it was patched, got another"
            f" {type(module).__name__}; patch the model again after changing it"
        )
    return Site("decoder", module.layer_idx)  # type: ignore[arg-type]


def is_marked(model: nn.Module) -> bool:
    """Whether a part of the model belongs to a patched encoder-decoder."""
    return any(MARK in module.__dict__ for module in model.modules())


def mark(model: nn.Module, calls: list[tuple[nn.Module, int]], source: int) -> dict[str, int]:
    """Mark the attention modules in the order in which a trial run called them.

    Args:
        calls: each attention call's module and number of keys.
        source: the encoder's number of tokens in the trial.

    Returns:
        The number of layers found at each site.
    """
    encoder = set(model.get_encoder().modules())  # type: ignore[operator]
    found = dict.fromkeys(SITES, 0)
    first: dict[str, nn.Module] = {}
    for module, keys in calls:
        name = "encoder" if module in encoder else "cross" if keys == source else "decoder"
        first.setdefault(name, module)
        biased = next((m for m in (module, first[name]) if getattr(m, "has_relative_attention_bias", False)), None)
        module.__dict__[MARK] = Site(name, found[name], biased if name != "cross" else None)
        found[name] += 1
    return found


def unmark(model: nn.Module) -> None:
    """Take every mark away, and give the position embeddings their classes back."""
    for module in model.modules():
        module.__dict__.pop(MARK, None)
        if isinstance(module, ShiftedPositions):
            module.__class__ = type(module)._prefix_fast_class
            module.__dict__.pop(SHIFT, None)


def relative_bias(site: Site, queries: int, length: int, past: Tensor | int) -> Tensor | None:
    """The bias [1, H, Tq, P] of queries that stand `past` tokens after the end of a prefix of `length`."""
    if site.bias is None:
        return None
    device = site.bias.relative_attention_bias.weight.device  # type: ignore[union-attr]
    return site.bias.compute_bias(queries, length, device=device, past_seen_tokens=past + length)  # type: ignore[operator]


class Places:
    """Where the tokens of one forward stand.

    Attributes:
        positions: [1, total] of packed tokens, those of the prefix counted.
        read: whether the position embedding has been asked for them.
    """

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions
        self.read = False


class ShiftedPositions:
    """What a position embedding does otherwise than its class: it counts the prefix's tokens and places packed ones."""

    _prefix_fast_class: Any
    _prefix_fast_explicit: bool  # whether it takes positions

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._prefix_fast_class,), self.__dict__


@functools.cache
def _shifted_class(cls: Any) -> Any:
    original = cls.forward
    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        shift, choice = self.__dict__.get(SHIFT, (0, None))
        places = self.__dict__.get(PLACES)
        if places is None and choice is None and shift == 0:
            return original(self, *args, **kwargs)
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if places is not None:
            places.read = True
            return _embedded(self, original, arguments, places.positions)
        if choice is not None:
            return _shifted_rows(self, original, arguments, choice)
        positions = arguments.get("position_ids")
        if positions is None:
            arguments["past_key_values_length"] = arguments.get("past_key_values_length", 0) + shift
        else:
            arguments["position_ids"] = _in_table(self, positions + shift)
        return original(self, **arguments)

    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_prefix_fast_class": cls,
        "_prefix_fast_explicit": "position_ids" in names,
        "forward": forward,
    }
    return type(cls.__name__, (ShiftedPositions, cls), namespace)


def _shifted_rows(table: Any, original: Any, arguments: dict[str, Any], choice: Choice) -> Tensor:
    """The embeddings [B, T, hidden] of tokens that stand further on by each row's own prefix."""
    past = arguments.get("past_key_values_length", 0)
    if not table._prefix_fast_explicit:  # counted from the tokens, in a way of its own
        found = original(table, **arguments)
        for size in sorted(set(choice.sizes)):
            moved = original(table, **{**arguments, "past_key_values_length": past + size})
            found = torch.where((choice.lengths == size).unsqueeze(-1), moved, found)
        return found
    positions = arguments.get("position_ids")
    if positions is None:
        tokens: Any = arguments.get("input_ids", arguments.get("input_ids_shape"))
        count = tokens.shape[1] if isinstance(tokens, Tensor) else tokens[1]
        positions = torch.arange(count, device=choice.lengths.device) + past
    return _embedded(table, original, arguments, positions + choice.lengths)


def _embedded(table: Any, original: Any, arguments: dict[str, Any], positions: Tensor) -> Tensor:
    """The embeddings [B, T, hidden] of positions [B, T]."""
    positions = _in_table(table, positions)
    # Some tables put a dimension before the positions that they are given: they are given them in one row.
    flat = original(table, **{**arguments, "position_ids": positions.reshape(-1)})
    return flat.reshape(*positions.shape, -1)


def _in_table(table: Any, positions: Tensor) -> Tensor:
    """The positions; raises ValueError where a learned table has no more of them."""
    limit = families.table_size(table) if isinstance(table, nn.Embedding) else None
    families.check_positions(positions, limit, type(table).__name__)
    return positions


def _rebuild(cls: Any) -> Any:
    return object.__new__(_shifted_class(cls))


def follow_positions(model: Any, style: str) -> None:
    """Let the decoder's position embedding be shifted, and the encoder's be placed where it takes positions.

    Raises:
        NotImplementedError: the decoder has none, or one that takes no past length.
    """
    if style != "embedded":
        return
    of_encoder, table = _tables(model)
    if table is None or "past_key_values_length" not in inspect.signature(type(table).forward).parameters:
        raise NotImplementedError(
            f"patch: expected a decoder whose embed_positions takes past_key_values_length, got {type(model).__name__};"
            " its positions cannot be shifted by the prefix, it cannot be patched"
        )
    _step_in(table)
    if of_encoder is not None and "position_ids" in inspect.signature(type(of_encoder).forward).parameters:
        _step_in(of_encoder)


def _tables(model: Any) -> tuple[Any, Any]:
    """The position embeddings of the encoder and of the decoder; None where one has none."""
    return tuple(getattr(part, "embed_positions", None) for part in (model.get_encoder(), model.get_decoder()))  # type: ignore[return-value]


def _step_in(table: Any) -> None:
    if not isinstance(table, ShiftedPositions):
        cls: Any = type(table)
        table.__class__ = _shifted_class(cls)


@contextmanager
def shifted(model: Any, style: str, length: int | Tensor, choice: Choice | None) -> Any:
    """For the time of one forward, let the decoder's positions begin at `length`; each row's own, if there is a choice.

    The embedding runs once in each forward and in no layer, so that no layer's recomputation looks for it later.
    """
    if style != "embedded":
        yield
        return
    table = model.get_decoder().embed_positions
    before = table.__dict__.get(SHIFT)
    table.__dict__[SHIFT] = (length, choice if isinstance(length, Tensor) else None)
    try:
        yield
    finally:
        del table.__dict__[SHIFT]
        if before is not None:
            table.__dict__[SHIFT] = before


def takes_places(model: Any, style: str) -> bool:
    """Whether encoder and decoder can be told where each of their tokens stands."""
    if style != "embedded":
        return False
    tables = _tables(model)
    explicit = all(isinstance(table, ShiftedPositions) and table._prefix_fast_explicit for table in tables)
    return explicit and tables[0] is not tables[1]


@contextmanager
def placed(model: Any, source: Tensor, target: Tensor) -> Any:
    """For the time of one forward, let packed tokens of encoder and decoder stand at these positions [1, total].

    Yields:
        The `Places` of both, which say afterwards whether they were read.
    """
    tables, places = _tables(model), (Places(source), Places(target))
    for table, places_of in zip(tables, places, strict=True):
        table.__dict__[PLACES] = places_of
    try:
        yield places
    finally:
        for table in tables:
            del table.__dict__[PLACES]


def trial_inputs(model: Any, source: int, target: int) -> dict[str, Any]:
    """The arguments of a forward of so many source and target tokens; `source` is the model's own where it is fixed."""
    config, device = model.config, model.device
    ids = torch.zeros(1, target, dtype=torch.long, device=device)
    if model.main_input_name == "input_features":
        frames = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions, device=device, dtype=model.dtype)
        return {"input_features": frames, "decoder_input_ids": ids}
    # Classifiers look for the end token, the same number of them in each row.
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return {"input_ids": torch.full((1, source), end or 0, device=device), "decoder_input_ids": ids}
