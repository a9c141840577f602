"""A folded prefix as files: PEFT's adapter format where it can express the prefix, otherwise our own.

PEFT: `adapter_config.json` and `adapter_model.safetensors` with one tensor `prompt_embeddings` [P, L · 2 · Hkv · D].
Of an encoder-decoder it has the decoder's self-attention alone, whose layer l reads the file's layer 2l mod L.
Native: `prefix_config.json` and `prefix.safetensors` with `<site>.keys`, `<site>.values` [L, Hkv, P, D].
Only safetensors are read and written; shapes and dtypes are checked in the header before any number is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, equal

from prefix_fast.files import read_json, read_tensors, replace_files
from prefix_fast.geometry import (
    SITES,
    Geometry,
    ModelSites,
    check_same_sites,
    checked_integer,
    join_flat,
    peft_layers,
    split_flat,
)

FORMATS = {
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
    "native": ("prefix_config.json", "prefix.safetensors"),
}
FILES = [name for names in FORMATS.values() for name in names]
# 1: a decoder-only model, its geometry beside the other fields; 2: a geometry for each site; 3: shifts_positions
NATIVE_VERSION = 3
PEFT_TENSOR = "prompt_embeddings"
# Both hold the keys and values in one layout; CARTRIDGE's frozen tokens are not marked in its weights.
PEFT_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class StoredPrefix:
    """What the files hold: per site the folded keys and values [L, Hkv, P, D], and what describes them."""

    model_sites: ModelSites
    sites: Mapping[str, tuple[Tensor, Tensor]]
    encoder_hidden_size: int = 512
    prefix_dropout: float = 0.0
    base_model_name: str | None = None
    shifts_positions: bool = True

    @property
    def num_virtual_tokens(self) -> int:
        """P, the same for all sites."""
        return next(iter(self.sites.values()))[0].shape[2]


def save(stored: StoredPrefix, directory: str | PathLike[str], format: str = "auto") -> None:
    """Write the prefix; a write that fails or is interrupted leaves what the folder held before.

    Both files are written beside their targets and synced before either is renamed into place.

    Args:
        stored: what to write, in float32.
        directory: made if it is not there.
        format: "peft", "native", or "auto": PEFT's where PEFT can express the prefix.

    Raises:
        ValueError: another format, NaN or infinity, a path that is a file, a folder that holds a prefix in the
            other format or another kind of adapter. NotImplementedError: PEFT cannot express it (with the reason).
    """
    _check_format("Prefix.save_pretrained", format)
    reason = _peft_cannot(stored)
    if format == "peft" and reason is not None:
        raise NotImplementedError(
            f"Prefix.save_pretrained: expected a prefix that PEFT can express, got one that it cannot: {reason}; "
            'use format="native"'
        )
    if format == "auto":
        format = "native" if reason is not None else "peft"
    for site, pair in stored.sites.items():
        if not all(tensor.isfinite().all() for tensor in pair):
            raise ValueError(
                f"Prefix.save_pretrained: expected finite keys and values, got NaN or infinity at {site!r}; the "
                "training has diverged, go back to an earlier prefix"
            )
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Prefix.save_pretrained: expected a folder, got the file {folder}; pass a folder")
    _check_free_for(folder, format)
    config, tensors = _peft_content(stored) if format == "peft" else _native_content(stored)

    from safetensors.torch import save as to_bytes

    config_name, weights_name = FORMATS[format]
    weights = to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    replace_files(folder, {weights_name: weights, config_name: text.encode()})


def _peft_cannot(stored: StoredPrefix) -> str | None:
    """Why PEFT's format cannot express the prefix; None: it can. An empty one it can: PEFT reads it as no prefix."""
    if set(stored.sites) != {"decoder"}:
        return f"it has prefixes at {sorted(stored.sites)}, PEFT has them at the decoder's self-attention alone"
    if not stored.shifts_positions:
        return "it leaves the tokens' positions where they are, PEFT moves them on by its length"
    if stored.model_sites.is_encoder_decoder:
        flat = _peft_flat(stored)
        layers = peft_layers(stored.model_sites.geometries["decoder"].num_layers)
        again = split_flat(flat, stored.model_sites.geometries["decoder"])
        if not all(equal(part[layers], given) for part, given in zip(again, stored.sites["decoder"], strict=True)):
            return (
                "its decoder layers l and l + L/2 differ, where PEFT's decoder layer l reads its layer 2l mod L, so"
                " that with an even number of layers both read the same"
            )
    return None


def _peft_flat(stored: StoredPrefix) -> Tensor:
    """PEFT's tensor [P, L · 2 · Hkv · D]. Of an encoder-decoder, the layers that PEFT's map never reads are zero."""
    keys, values = stored.sites["decoder"]
    if not stored.model_sites.is_encoder_decoder:
        return join_flat(keys, values)
    layers = peft_layers(keys.shape[0])
    placed = keys.new_zeros(2, *keys.shape)
    placed[0, layers], placed[1, layers] = keys, values
    return join_flat(placed[0], placed[1])


def _peft_content(stored: StoredPrefix) -> tuple[dict[str, Any], dict[str, Tensor]]:
    geometry, seq2seq = stored.model_sites.geometries["decoder"], stored.model_sites.is_encoder_decoder
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": stored.base_model_name,
        "encoder_hidden_size": stored.encoder_hidden_size,
        "inference_mode": True,
        "init_weights": None,
        "modules_to_save": None,
        "num_attention_heads": geometry.num_kv_heads,
        "num_layers": geometry.num_layers,
        "num_transformer_submodules": 2 if seq2seq else 1,
        "num_virtual_tokens": stored.num_virtual_tokens,
        "peft_type": "PREFIX_TUNING",
        "peft_version": None,
        "prefix_projection": False,
        "revision": None,
        "task_type": "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        "token_dim": geometry.token_dim,
    }
    return config, {PEFT_TENSOR: _peft_flat(stored).cpu()}


def _native_content(stored: StoredPrefix) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config: dict[str, Any] = {
        "num_virtual_tokens": stored.num_virtual_tokens,
        "encoder_hidden_size": stored.encoder_hidden_size,
        "prefix_dropout": stored.prefix_dropout,
        "base_model_name_or_path": stored.base_model_name,
    }
    geometries = {site: asdict(geometry) for site, geometry in stored.model_sites.geometries.items()}
    if stored.model_sites.is_encoder_decoder:
        config |= {"format_version": 2, "is_encoder_decoder": True, "sites": geometries}
    else:
        config |= {"format_version": 1, "sites": sorted(geometries), **geometries["decoder"]}
    if not stored.shifts_positions:
        config |= {"format_version": 3, "shifts_positions": False}
    tensors = {}
    for site, (keys, values) in stored.sites.items():
        tensors[f"{site}.keys"], tensors[f"{site}.values"] = keys.cpu(), values.cpu()
    return config, tensors


def _check_format(where: str, format: str) -> None:
    if format not in ("auto", *FORMATS):
        raise ValueError(f"{where}: expected format to be 'auto', 'peft' or 'native', got {format!r}; pass one of them")


def _check_free_for(folder: Path, format: str) -> None:
    """Refuse a folder that would end with two prefixes in it, or with half of another adapter."""
    for other, names in FORMATS.items():
        held = [name for name in names if (folder / name).exists()]
        if other != format and held:
            raise ValueError(
                f"Prefix.save_pretrained: expected a folder without files of the {other} format, got {held} in "
                f"{folder}; use another folder, or remove them"
            )
    config_file = folder / FORMATS["peft"][0]
    if format == "peft" and config_file.exists():
        try:
            kind = json.loads(config_file.read_bytes()).get("peft_type")
        except (ValueError, AttributeError):
            return
        if kind not in PEFT_TYPES:
            raise ValueError(
                f"Prefix.save_pretrained: expected a folder without another adapter, got a {kind} adapter in "
                f"{folder}; use another folder"
            )


def load(folder: Path, format: str = "auto", expected: ModelSites | None = None) -> StoredPrefix:
    """Read a prefix as float32. PEFT's folded prefixes and CARTRIDGE's come as they are, frozen tokens included.

    Args:
        folder: what `save` or PEFT's save_pretrained wrote.
        format: "peft", "native", or "auto": whichever is there.
        expected: the sites of the model it is for, checked before any number is read. An encoder-decoder may have fewer
            decoder layers than PEFT's file, which counts the encoder's; without it, they are taken to be as many.

    Raises:
        FileNotFoundError: files are missing (the message lists those found).
        ValueError: pickled, truncated or garbled files, wrong fields, names or shapes, NaN or infinity, another
            kind of adapter, a prefix for another model. TypeError: fields or tensors of another type.
    """
    format, config, stored_sites, tokens = describe(folder, format, expected)
    config_name, weights_name = FORMATS[format]
    sites = (_read_peft if format == "peft" else _read_native)(folder / weights_name, config, stored_sites, tokens)
    hidden = config.get("encoder_hidden_size")
    name = config.get("base_model_name_or_path")
    return StoredPrefix(
        model_sites=stored_sites,
        sites=sites,
        encoder_hidden_size=512 if hidden is None else checked_integer(hidden, "encoder_hidden_size", 1, config_name),
        prefix_dropout=config.get("prefix_dropout", 0.0),
        base_model_name=name if isinstance(name, str) else None,
        shifts_positions=config.get("shifts_positions", True) is not False,
    )


def _read_peft(
    file: Path, config: dict[str, Any], found: ModelSites, tokens: int
) -> Mapping[str, tuple[Tensor, Tensor]]:
    written = _peft_geometry(config)
    flat = read_tensors(file, {PEFT_TENSOR: (tokens, written.flat_dim)})[PEFT_TENSOR]
    keys, values = split_flat(flat, written)
    if found.is_encoder_decoder:
        chosen = peft_layers(written.num_layers)[: found.geometries["decoder"].num_layers]
        keys, values = keys[chosen], values[chosen]
    return {"decoder": (keys, values)}


def _peft_sites(config: dict[str, Any], expected: ModelSites | None) -> ModelSites:
    written = _peft_geometry(config)
    seq2seq = config.get("num_transformer_submodules") == 2 or config.get("task_type") == "SEQ_2_SEQ_LM"
    layers = written.num_layers
    if seq2seq and expected is not None:
        layers = min(layers, expected.geometries["decoder"].num_layers)
    return ModelSites({"decoder": replace(written, num_layers=layers)}, seq2seq)


def _read_native(
    file: Path, config: dict[str, Any], found: ModelSites, tokens: int
) -> Mapping[str, tuple[Tensor, Tensor]]:
    shapes = {
        f"{site}.{part}": (shape.num_layers, shape.num_kv_heads, tokens, shape.head_dim)
        for site, shape in found.geometries.items()
        for part in ("keys", "values")
    }
    tensors = read_tensors(file, shapes)
    return {site: (tensors[f"{site}.keys"], tensors[f"{site}.values"]) for site in found.geometries}


def describe(
    folder: Path, format: str = "auto", expected: ModelSites | None = None
) -> tuple[str, dict[str, Any], ModelSites, int]:
    """What a prefix's config file says: its format, the fields, the sites and P. Reads no number; raises as `load`."""
    _check_format("Prefix.from_pretrained", format)
    format = _found_format(folder, format)
    config = read_json(folder / FORMATS[format][0])
    found = _peft_sites(config, expected) if format == "peft" else _native_model_sites(config)
    if expected is not None:
        check_same_sites(found, expected, "Prefix.from_pretrained")
    return format, config, found, _tokens(config, format)


def _tokens(config: dict[str, Any], format: str) -> int:
    return checked_integer(config.get("num_virtual_tokens"), "num_virtual_tokens", 0, FORMATS[format][0])


def _found_format(folder: Path, format: str) -> str:
    """The format whose two files are there; raises with what was found instead."""
    present = sorted(entry.name for entry in folder.iterdir())
    wanted = [name for name in FORMATS if format in ("auto", name)]
    complete = [name for name in wanted if set(FORMATS[name]) <= set(present)]
    if len(complete) > 1:
        raise ValueError(
            f"Prefix.from_pretrained: expected one prefix, got files of the peft and of the native format in {folder}; "
            "name the one with format="
        )
    if complete:
        return complete[0]
    pickles = [name for name in present if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in present):
        raise ValueError(
            f"Prefix.from_pretrained: expected safetensors, got pickled weights {pickles} in {folder}, which can run "
            "code when they are loaded; if you trust them, convert them once with safetensors.torch.save_file("
            f'torch.load("{pickles[0]}", weights_only=True), "adapter_model.safetensors")'
        )
    needed = " or ".join(" and ".join(FORMATS[name]) for name in wanted)
    raise FileNotFoundError(
        f"Prefix.from_pretrained: expected {needed} in {folder}, got {present or 'an empty folder'}; pass the folder "
        "that save_pretrained wrote"
    )


def _peft_geometry(config: dict[str, Any]) -> Geometry:
    where = FORMATS["peft"][0]
    kind = config.get("peft_type")
    if kind not in PEFT_TYPES:
        raise ValueError(
            f"{where}: expected peft_type to be one of {', '.join(PEFT_TYPES)}, got {kind!r}; load that adapter with "
            "peft"
        )
    layers = checked_integer(config.get("num_layers"), "num_layers", 1, where)
    heads = checked_integer(config.get("num_attention_heads"), "num_attention_heads", 1, where)
    width = checked_integer(config.get("token_dim"), "token_dim", 1, where)
    if width % heads:
        raise ValueError(
            f"{where}: expected token_dim to be a multiple of num_attention_heads, got {width} and {heads}; the "
            "file is damaged, save it again"
        )
    return Geometry(layers, heads, width // heads)


def _native_model_sites(config: dict[str, Any]) -> ModelSites:
    where = FORMATS["native"][0]
    version = checked_integer(config.get("format_version"), "format_version", 1, where)
    if version > NATIVE_VERSION:
        raise ValueError(
            f"{where}: expected format_version <= {NATIVE_VERSION}, got {version}; a newer prefix_fast wrote it, "
            "update this one"
        )
    sites = config.get("sites")
    if version == 1 or (version > 2 and not config.get("is_encoder_decoder", False)):
        if sites != ["decoder"]:
            raise ValueError(f"{where}: expected sites to be ['decoder'], got {sites!r}; the file is damaged")
        return ModelSites({"decoder": _checked_geometry(config, where)})
    named = isinstance(sites, dict) and bool(sites) and set(sites) <= set(SITES)
    if not isinstance(sites, dict) or not named or not all(isinstance(shape, dict) for shape in sites.values()):
        raise ValueError(f"{where}: expected the sizes of each site, of {', '.join(SITES)}, got sites={sites!r}")
    shapes = {site: _checked_geometry(sites[site], f"{where}, site {site!r}") for site in SITES if site in sites}
    return ModelSites(shapes, is_encoder_decoder=True)


def _checked_geometry(fields: dict[str, Any], where: str) -> Geometry:
    return Geometry(*(checked_integer(fields.get(name), name, 1, where) for name in Geometry.__dataclass_fields__))
