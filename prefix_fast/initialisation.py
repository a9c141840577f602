"""Where a prefix can start: a computed key/value cache, or the model's own keys and values for a text."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def keys_and_values_from_cache(past_key_values: Any) -> tuple[Tensor, Tensor]:
    """Keys and values [L, Hkv, P, D] of a cache, as detached float32 copies on the cache's device.

    Args:
        past_key_values: a transformers DynamicCache or StaticCache (slots not yet written are dropped), or a
            sequence with one (key, value) pair [B, Hkv, P, D] per layer. B must be 1, or all rows equal up to
            rounding: the first is taken.

    Raises:
        TypeError: no cache, or integer tensors. ValueError: an empty cache, different rows, tensors of other
            ranks or shapes, tokens lost to a sliding window, NaN or infinity.
        NotImplementedError: encoder-decoder, quantised or recurrent caches, layers of different shapes, value
            dim ≠ key dim.
    """
    pairs = [_checked_pair(layer, *pair) for layer, pair in enumerate(_layer_pairs(past_key_values))]
    if not pairs:
        raise ValueError("Prefix.from_cache: expected at least one layer, got an empty cache; fill it first")
    shapes = {(key.shape[0], key.shape[2]) for key, _ in pairs}
    if len(shapes) > 1:
        raise NotImplementedError(
            "Prefix.from_cache: expected layers of one shape, got (num_kv_heads, head_dim) in "
            f"{sorted(shapes)}; prefixes of models whose layers differ are not supported"
        )
    lengths = sorted({key.shape[1] for key, _ in pairs})
    if len(lengths) > 1:
        raise ValueError(
            f"Prefix.from_cache: expected layers with equally many tokens, got {lengths}; compute the cache "
            "without a window"
        )
    keys = torch.stack([key.detach().to(torch.float32) for key, _ in pairs])
    values = torch.stack([value.detach().to(keys) for _, value in pairs])
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise ValueError(
            "Prefix.from_cache: expected finite keys and values, got NaN or infinity; compute the cache in a "
            "wider dtype"
        )
    return keys, values


def _layer_pairs(past_key_values: Any) -> Iterator[tuple[Any, Any]]:
    """One (key, value) pair per layer, cut to the tokens that were written."""
    if hasattr(past_key_values, "self_attention_cache") or hasattr(past_key_values, "cross_attention_cache"):
        raise NotImplementedError(
            "Prefix.from_cache: expected a decoder-only model's cache, got an encoder-decoder cache; pass "
            "its self_attention_cache"
        )
    layers = getattr(past_key_values, "layers", None)
    if layers is not None:
        return (_written(index, layer) for index, layer in enumerate(layers))
    if isinstance(past_key_values, (tuple, list)):
        return (_legacy(index, layer) for index, layer in enumerate(past_key_values))
    raise TypeError(
        "Prefix.from_cache: expected a transformers cache or a tuple of (key, value) pairs, got "
        f"{type(past_key_values).__name__}; pass the model output's past_key_values"
    )


def _legacy(index: int, layer: Any) -> tuple[Any, Any]:
    if not isinstance(layer, (tuple, list)) or len(layer) < 2:
        raise TypeError(
            f"Prefix.from_cache: expected layer {index} to be a pair (key, value), got "
            f"{type(layer).__name__}; pass one pair per layer"
        )
    if len(layer) > 2:
        raise NotImplementedError(
            f"Prefix.from_cache: expected layer {index} to be a pair (key, value), got {len(layer)} entries "
            "as in an encoder-decoder cache; pass the self-attention pairs alone"
        )
    return layer[0], layer[1]


def _written(index: int, layer: Any) -> tuple[Any, Any]:
    if hasattr(layer, "_quantized_keys"):
        raise NotImplementedError(
            f"Prefix.from_cache: expected plain keys and values, got a quantised cache in layer {index}; "
            "compute the cache without quantisation"
        )
    if not hasattr(layer, "keys") or not hasattr(layer, "values"):
        raise NotImplementedError(
            f"Prefix.from_cache: expected an attention cache, got {type(layer).__name__} in layer {index}; "
            "prefixes of models with recurrent layers are not supported"
        )
    keys, values = layer.keys, layer.values
    if keys is None or values is None:
        raise ValueError(
            f"Prefix.from_cache: expected tokens in every layer, got none in layer {index}; run the model "
            "with this cache first"
        )
    seen = int(layer.get_seq_length())
    if seen > keys.shape[-2]:
        raise ValueError(
            f"Prefix.from_cache: expected all {seen} tokens in layer {index}, got the last {keys.shape[-2]} "
            "of a sliding window; use a shorter text"
        )
    return keys[..., :seen, :], values[..., :seen, :]


def _checked_pair(index: int, key: Any, value: Any) -> tuple[Tensor, Tensor]:
    """Key and value [Hkv, P, D] of one layer, of one row."""
    for name, tensor in (("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"Prefix.from_cache: expected a floating-point {name} in layer {index}, got {what}; pass the "
                "model output's past_key_values"
            )
        if tensor.dim() != 4 or tensor.shape[0] < 1:
            raise ValueError(
                f"Prefix.from_cache: expected {name} [B, Hkv, P, D] with B >= 1 in layer {index}, got "
                f"{tuple(tensor.shape)}; pass the model output's past_key_values"
            )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"Prefix.from_cache: expected key and value of one shape in layer {index}, got "
            f"{tuple(key.shape)} and {tuple(value.shape)}; pass the model output's past_key_values"
        )
    if key.shape[3] != value.shape[3]:
        raise NotImplementedError(
            f"Prefix.from_cache: expected value dim = key dim in layer {index}, got {value.shape[3]} and "
            f"{key.shape[3]}; such models are not supported"
        )
    if not (_rows_agree(key) and _rows_agree(value)):
        raise ValueError(
            f"Prefix.from_cache: expected one row, or identical rows, got {key.shape[0]} different rows in layer "
            f"{index}; compute the cache of one row"
        )
    return key[0], value[0]


def _rows_agree(tensor: Tensor) -> bool:
    """Whether each token [Hkv, ·, D] of each row is the first row's up to rounding: equal texts in one batch differ
    by that, other texts by as much as the tensor's own size. NaN is left to the check that names it."""
    first = tensor[:1].detach().float()
    apart = (tensor[1:].detach().float() - first).square().sum(dim=(1, 3))
    return not (apart > torch.finfo(tensor.dtype).eps * first.square().sum(dim=(1, 3))).any()


def keys_and_values_from_text(model: Any, tokenizer: Any, text: str, num_tokens: int | None) -> tuple[Tensor, Tensor]:
    """The model's own keys and values [L, Hkv, P, D] for the text, float32, computed in evaluation mode.

    The text is tokenised as the tokenizer does by default (with a start token where it adds one) and stands
    at positions 0 … P - 1, so that the rows that follow it see what they would see with the text before them.

    Raises:
        TypeError: the text is not a string. ValueError: a text without tokens, a number of tokens other than
            `num_tokens`, ids outside the model's vocabulary, more tokens than the model has positions.
    """
    if not isinstance(text, str):
        raise TypeError(f"Prefix.from_text: expected text to be a str, got {type(text).__name__}; pass one text")
    ids = list(tokenizer(text)["input_ids"])
    if not ids:
        raise ValueError(
            "Prefix.from_text: expected a text with at least one token, got none; pass words to start from"
        )
    if num_tokens is not None and len(ids) != num_tokens:
        change = "shorten the text" if len(ids) > num_tokens else "lengthen or repeat the text"
        raise ValueError(
            f"Prefix.from_text: expected a text of num_virtual_tokens={num_tokens} tokens, got {len(ids)} "
            f"tokens; {change}, or set num_virtual_tokens={len(ids)} (the text is neither cut nor repeated)"
        )
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    text_config = model.config.get_text_config(decoder=True)
    vocabulary = getattr(text_config, "vocab_size", None)
    if vocabulary is not None and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ValueError(
            f"Prefix.from_text: expected token ids below the model's vocabulary size {vocabulary}, got "
            f"{min(ids)} … {max(ids)}; pass the model's own tokenizer"
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and len(ids) > positions:
        raise ValueError(
            f"Prefix.from_text: expected at most {positions} tokens, the model's positions, got {len(ids)}; "
            "shorten the text"
        )
    # The backbone alone: the head would compute logits over the vocabulary that nobody reads.
    backbone = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    with torch.no_grad(), _evaluation(model):
        output = backbone(input_ids=torch.tensor([ids], device=device), use_cache=True)
    return keys_and_values_from_cache(output.past_key_values)


@contextmanager
def _evaluation(model: Any) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
