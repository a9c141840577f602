"""A prefix from one format into another: PEFT's, ours, the original Prefix-Tuning code's, that of `adapters`."""

import io
import pickle
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from prefix_fast import adapters_files
from prefix_fast.files import replace_files
from prefix_fast.prefix import Prefix

FORMATS = ("peft", "native", "original")
# The name under which the original training script saved its prefix.
ORIGINAL_FILE = "pytorch_model.bin"
_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")


def convert(source: str | PathLike[str], output: str | PathLike[str], to: str, model_config: Any = None) -> Prefix:
    """Read a prefix in whichever format it has and write it in another; a write that fails leaves what was there.

    Args:
        source: a folder or Hub id with PEFT's or our files, a folder of `adapters`, or a file of the original code's
            weights.
        output: a folder, made if it is not there.
        to: "peft"; "native" (`prefix.safetensors` with `<site>.keys`, `<site>.values` [L, Hkv, P, D]); "original" (the
            reparametrised parameters under the original names, which only a file of them has).
        model_config: of the model that the prefix is for, which the files of `adapters` and of the original code do
            not describe; others are checked against it.

    Returns:
        The prefix.

    Raises:
        ValueError: an unknown format, a source that is no prefix or one for another model. NotImplementedError: a
            format that cannot express the prefix. FileNotFoundError: no such source.
    """
    if to not in FORMATS:
        raise ValueError(f"convert: expected a format of {', '.join(FORMATS)}, got {to!r}; choose one")
    prefix = _read(source, model_config)
    if to != "original":
        prefix.save_pretrained(output, format=to)
        return prefix
    weights = io.BytesIO()
    torch.save(prefix.original_state_dict(), weights)
    Path(output).mkdir(parents=True, exist_ok=True)
    replace_files(Path(output), {ORIGINAL_FILE: weights.getvalue()})
    return prefix


def _read(source: str | PathLike[str], model_config: Any) -> Prefix:
    path = Path(source)
    of_adapters = path.is_dir() and adapters_files.holds_adapter(path)
    if not of_adapters and (path.is_dir() or path.suffix not in _WEIGHTS):
        return Prefix.from_pretrained(source, model_config=model_config)
    if not path.exists():
        raise FileNotFoundError(f"convert: expected a file of weights, got {path}, which is not there; check the path")
    if model_config is None:
        raise ValueError(f"convert: expected the model that {path} is for, which it does not name; pass it (--model)")
    if of_adapters:
        return Prefix.from_adapters(path, model_config)
    return Prefix.from_original(_state_dict(path), model_config)


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; nothing in it is run."""
    try:
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"convert: expected a file of tensors, got {path}, which cannot be read: {error}") from error
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):  # of a Lightning checkpoint
        held = held["state_dict"]
    if not isinstance(held, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
        raise ValueError(f"convert: expected tensors by name in {path}, got other things; pass a state_dict")
    return held
