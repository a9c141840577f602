"""Prefixes that the library `adapters` (AdapterHub) saved: `adapter_config.json` and the weights of one adapter.

    decoder   ….prefix_tunings.<name>.self_prefix.…        (of an encoder-only model too)
    encoder   ….prefix_tunings.<name>.encoder_prefix.…
    cross     ….prefix_tunings.<name>.cross_prefix.…

Each is a reparametrised prefix (wte.weight, control_trans.{0,2}.{weight,bias}, with an activation between) or, after
`eject_prefix_tuning`, one flat vector control_trans [P · 2 · L · Hkv · D]. Its attention puts the prefix before its
layer's keys and values without moving the tokens' positions on.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefix_fast.files import read_json
from prefix_fast.geometry import Geometry, ModelSites, split_flat

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
LOCATIONS = {"encoder_prefix": "encoder", "self_prefix": "decoder", "cross_prefix": "cross"}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}
_WHERE = "Prefix.from_adapters"


def holds_adapter(folder: Path) -> bool:
    """Whether the folder is one that `adapters` wrote."""
    file = folder / CONFIG_FILE
    return file.is_file() and isinstance(read_json(file).get("config"), dict)


def read(folder: Path, offered: ModelSites) -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
    """P, and per site the folded keys and values [L, Hkv, P, D] in float32.

    Raises:
        FileNotFoundError: files are missing. ValueError: another adapter, or one for another model.
        NotImplementedError: gates, layers left out, an activation that is not tanh or relu.
    """
    config = _checked_config(folder)
    tokens = config["prefix_length"]
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _weights(folder).items():
        parts = name.partition(".prefix_tunings.")[2].split(".", 2)
        if len(parts) < 3 or parts[1] not in LOCATIONS:
            raise ValueError(
                f"{_WHERE}: expected names with .prefix_tunings.<name>.{{{', '.join(LOCATIONS)}}}, got {name!r}; the"
                " file holds more than a prefix"
            )
        found.setdefault(LOCATIONS[parts[1]], {})[parts[2]] = tensor.float()
    absent = sorted(set(found) - set(offered.geometries))
    if absent or not found:
        raise ValueError(
            f"{_WHERE}: expected prefixes at {sorted(offered.geometries)}, got {sorted(found)}; use the model that the"
            " adapter was trained for"
        )
    return tokens, {
        site: _folded(found[site], tokens, offered.geometries[site], site, config) for site in sorted(found)
    }


def _checked_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{_WHERE}: expected {CONFIG_FILE} in {folder}, got none; pass the adapter's folder")
    config = read_json(folder / CONFIG_FILE).get("config")
    kind = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(config, dict) or kind != "prefix_tuning":
        raise ValueError(f"{_WHERE}: expected an adapter of the architecture prefix_tuning, got {kind!r}")
    length = config.get("prefix_length")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"{_WHERE}: expected prefix_length >= 1, got {length!r}; the file is damaged")
    for name in ("use_gating", "leave_out"):
        if config.get(name):
            raise NotImplementedError(f"{_WHERE}: expected a prefix in every layer without gates, got {name}")
    return config


def _weights(folder: Path) -> Mapping[str, Tensor]:
    """The tensors by name; nothing in a pickled file is run."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{_WHERE}: expected {' or '.join(WEIGHTS_FILES)} in {folder}, got neither")
    try:
        return load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{_WHERE}: expected a file of tensors, got {file}, which cannot be read: {error}") from error


def _folded(
    part: dict[str, Tensor], tokens: int, geometry: Geometry, site: str, config: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    flat = part.get("control_trans")
    if flat is None:
        name = str(config.get("non_linearity", "tanh")).lower()
        if name not in _ACTIVATIONS:
            raise NotImplementedError(f"{_WHERE}: expected non_linearity {' or '.join(_ACTIVATIONS)}, got {name!r}")
        layers = [f"control_trans.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
        missing = sorted({"wte.weight", *layers} - set(part))
        if missing:
            raise ValueError(f"{_WHERE}: expected {missing} at the site {site!r}, got {sorted(part)}")
        first, first_bias, second, second_bias = (part[layer] for layer in layers)
        try:
            hidden = _ACTIVATIONS[name](torch.nn.functional.linear(part["wte.weight"], first, first_bias))
            flat = torch.nn.functional.linear(hidden, second, second_bias)
        except RuntimeError as error:
            raise ValueError(f"{_WHERE}: expected weights that fit each other at {site!r}, got {error}") from error
    if flat.numel() != tokens * geometry.flat_dim:
        raise ValueError(
            f"{_WHERE}: expected {tokens} · {geometry.flat_dim} numbers at the site {site!r}, got {flat.numel()}; use"
            " the model that the adapter was trained for"
        )
    keys, values = split_flat(flat.reshape(tokens, geometry.flat_dim), geometry)
    return keys.contiguous(), values.contiguous()
