"""A folded prefix as files: PEFT's adapter format where it can express the prefix, otherwise our own.

PEFT: `adapter_config.json` and `adapter_model.safetensors` with one tensor `prompt_embeddings` [P, L · 2 · Hkv · D].
Native: `prefix_config.json` and `prefix.safetensors` with `<site>.keys`, `<site>.values` [L, Hkv, P, D].
Only safetensors are read and written; shapes and dtypes are checked in the header before any number is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from prefix_fast.files import read_json, read_tensors, replace_files
from prefix_fast.geometry import Geometry, check_same_geometry, checked_integer, join_flat, split_flat

FORMATS = {
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
    "native": ("prefix_config.json", "prefix.safetensors"),
}
FILES = [name for names in FORMATS.values() for name in names]
NATIVE_VERSION = 1
PEFT_TENSOR = "prompt_embeddings"
# Both hold the keys and values in one layout; CARTRIDGE's frozen tokens are not marked in its weights.
PEFT_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class StoredPrefix:
    """What the files hold: per site the folded keys and values [L, Hkv, P, D], and what describes them."""

    geometry: Geometry
    sites: Mapping[str, tuple[Tensor, Tensor]]
    encoder_hidden_size: int = 512
    prefix_dropout: float = 0.0
    base_model_name: str | None = None

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
    return None


def _peft_content(stored: StoredPrefix) -> tuple[dict[str, Any], dict[str, Tensor]]:
    keys, values = stored.sites["decoder"]
    geometry = stored.geometry
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": stored.base_model_name,
        "encoder_hidden_size": stored.encoder_hidden_size,
        "inference_mode": True,
        "init_weights": None,
        "modules_to_save": None,
        "num_attention_heads": geometry.num_kv_heads,
        "num_layers": geometry.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": stored.num_virtual_tokens,
        "peft_type": "PREFIX_TUNING",
        "peft_version": None,
        "prefix_projection": False,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": geometry.token_dim,
    }
    return config, {PEFT_TENSOR: join_flat(keys, values).cpu()}


def _native_content(stored: StoredPrefix) -> tuple[dict[str, Any], dict[str, Tensor]]:
    geometry = stored.geometry
    config = {
        "format_version": NATIVE_VERSION,
        "num_layers": geometry.num_layers,
        "num_kv_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
        "num_virtual_tokens": stored.num_virtual_tokens,
        "encoder_hidden_size": stored.encoder_hidden_size,
        "prefix_dropout": stored.prefix_dropout,
        "sites": sorted(stored.sites),
        "base_model_name_or_path": stored.base_model_name,
    }
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


def load(folder: Path, format: str = "auto", expected: Geometry | None = None) -> StoredPrefix:
    """Read a prefix as float32. PEFT's folded prefixes and CARTRIDGE's come as they are, frozen tokens included.

    Args:
        folder: what `save` or PEFT's save_pretrained wrote.
        format: "peft", "native", or "auto": whichever is there.
        expected: the geometry of the model it is for, checked before any number is read.

    Raises:
        FileNotFoundError: files are missing (the message lists those found).
        ValueError: pickled, truncated or garbled files, wrong fields, names or shapes, NaN or infinity, another
            kind of adapter, a prefix for another model. TypeError: fields or tensors of another type.
        NotImplementedError: a prefix for an encoder-decoder.
    """
    _check_format("Prefix.from_pretrained", format)
    format = _found_format(folder, format)
    config_name, weights_name = FORMATS[format]
    config = read_json(folder / config_name)
    stored_geometry = _peft_geometry(config) if format == "peft" else _native_geometry(config)
    if expected is not None:
        check_same_geometry(stored_geometry, expected, "Prefix.from_pretrained")
    tokens = checked_integer(config.get("num_virtual_tokens"), "num_virtual_tokens", 0, config_name)
    shapes: dict[str, tuple[int, ...]]
    if format == "peft":
        shapes = {PEFT_TENSOR: (tokens, stored_geometry.flat_dim)}
    else:
        names = _native_sites(config)
        shape = (stored_geometry.num_layers, stored_geometry.num_kv_heads, tokens, stored_geometry.head_dim)
        shapes = {f"{site}.{part}": shape for site in names for part in ("keys", "values")}
    tensors = read_tensors(folder / weights_name, shapes)
    if format == "peft":
        sites = {"decoder": split_flat(tensors[PEFT_TENSOR], stored_geometry)}
    else:
        sites = {site: (tensors[f"{site}.keys"], tensors[f"{site}.values"]) for site in names}
    hidden = config.get("encoder_hidden_size")
    name = config.get("base_model_name_or_path")
    return StoredPrefix(
        geometry=stored_geometry,
        sites=sites,
        encoder_hidden_size=512 if hidden is None else checked_integer(hidden, "encoder_hidden_size", 1, config_name),
        prefix_dropout=config.get("prefix_dropout", 0.0),
        base_model_name=name if isinstance(name, str) else None,
    )


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
    if config.get("num_transformer_submodules") == 2 or config.get("task_type") == "SEQ_2_SEQ_LM":
        raise NotImplementedError(
            f"{where}: expected a decoder-only model's prefix, got one for an encoder-decoder "
            "(num_transformer_submodules=2 or task_type SEQ_2_SEQ_LM); these are not supported yet"
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


def _native_geometry(config: dict[str, Any]) -> Geometry:
    where = FORMATS["native"][0]
    version = checked_integer(config.get("format_version"), "format_version", 1, where)
    if version > NATIVE_VERSION:
        raise ValueError(
            f"{where}: expected format_version <= {NATIVE_VERSION}, got {version}; a newer prefix_fast wrote it, "
            "update this one"
        )
    return Geometry(*(checked_integer(config.get(name), name, 1, where) for name in Geometry.__dataclass_fields__))


def _native_sites(config: dict[str, Any]) -> list[str]:
    where = FORMATS["native"][0]
    sites = config.get("sites")
    if sites != ["decoder"]:
        supported = isinstance(sites, list) and set(map(str, sites)) <= {"encoder", "decoder", "cross"}
        error = NotImplementedError if supported and sites else ValueError
        raise error(f"{where}: expected sites to be ['decoder'], got {sites!r}; other sites are not supported yet")
    return sites
