"""What a patched model writes: the prefix, not the language model that anyone can load again.

    DIR/adapter_config.json, adapter_model.safetensors    the prefix, folded, in PEFT's format
    DIR/model.safetensors                                 prefix.* alone, as trained: what Trainer resumes from

There is no config.json beside it: transformers' `from_pretrained` would take the folder for a whole model and fill it
with random weights. A model that is trained along with its prefix is saved whole, its prefix in DIR/prefix.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

PREFIX_FOLDER = "prefix"


def save_prefix(
    model: Any,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """`save_pretrained` of a model whose language model is frozen.

    Raises:
        ValueError: the model has no prefix. NotImplementedError: push_to_hub.
    """
    from safetensors.torch import save_file

    prefix = model.prefix
    if prefix is None:
        raise ValueError(
            f"save_pretrained: expected a prefix to save, got {type(model).__name__} patched with 0 virtual tokens;"
            " unpatch the model to save it"
        )
    if push_to_hub:
        raise NotImplementedError(
            "save_pretrained: expected push_to_hub=False, got True; push the prefix with model.prefix.push_to_hub(id)"
        )
    if not is_main_process:
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    prefix.save_pretrained(folder)
    if state_dict is None:
        tensors = {f"prefix.{name}": tensor for name, tensor in prefix.state_dict().items()}
    else:
        tensors = {name: tensor for name, tensor in state_dict.items() if name.startswith("prefix.")}
    part = folder / "model.safetensors.part"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, {"format": "pt"})
    os.replace(part, folder / "model.safetensors")


def save_beside_model(model: Any, save_directory: Any) -> None:
    """The prefix of a model that has just been saved whole, in a folder of its own."""
    if model.prefix is not None:
        model.prefix.save_pretrained(Path(save_directory) / PREFIX_FOLDER)
