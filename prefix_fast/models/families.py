"""What differs between model families: how positions are counted, where a position table ends.

A prefix of P virtual tokens stands before a row's own tokens, so positions are shifted by P: explicit ones, and those a
model would count itself.

    "arange"   past + 0, 1, 2, ... for every row        GPT-2, Llama, Qwen, GPT-NeoX and most others
    "mask"     (Σ mask + P) · mask - 1, over the padding mask: a padded token keeps -1        OPT
    "tokens"   (Σ [id ≠ pad] + past + P) · [id ≠ pad] + pad; given embeddings: pad + 1 + 0, 1, 2, ...        RoBERTa

Of an encoder-decoder, the decoder's positions are shifted alone, by the prefix of its self-attention (see `sites`).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

# model_type → how positions are counted when the caller gives none. Others are read from their decoder's source.
POSITION_STYLES = {
    **dict.fromkeys(("gpt2", "llama", "qwen3", "gpt_neox"), "arange"),
    **dict.fromkeys(("bert", "bert-generation", "electra", "ernie", "roc_bert"), "arange"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm"), "tokens"),
    **dict.fromkeys(("xlm-roberta-xl", "xmod"), "tokens"),
    "opt": "mask",
}
# Encoder-decoders: model_type → "embedded" (decoder.embed_positions) or "relative" (a bias by distance). A type that is
# not here is refused: each of these is compared with a prefix inside its own keys and values by the tests.
SEQ2SEQ_STYLES = {
    **dict.fromkeys(("bart", "mbart", "plbart", "marian", "pegasus", "m2m_100", "whisper"), "embedded"),
    **dict.fromkeys(("blenderbot", "blenderbot-small"), "embedded"),
    **dict.fromkeys(("t5", "mt5", "umt5"), "relative"),
}
# The statements by which transformers' decoders count positions; whitespace removed.
_ARANGES = [
    f"position_ids=torch.arange({states}.shape[1],device={states}.device)+past_seen_tokens"
    for states in ("inputs_embeds", "hidden_states")
]
# Attributes that hold a table of learned positions.
_TABLES = ("wpe", "embed_positions", "position_embedding", "position_embeddings")


def position_style(model: Any) -> str | None:
    """How the model counts positions by itself: "arange", "mask", or None where it is not known."""
    if getattr(model.config, "is_encoder_decoder", False):
        return SEQ2SEQ_STYLES.get(model.config.model_type)
    style = POSITION_STYLES.get(model.config.model_type)
    if style is not None:
        return style
    for module in (model, *model.modules()):
        forward = inspect.unwrap(type(module).forward)
        code = getattr(forward, "__code__", None)
        if code is not None and "past_seen_tokens" in code.co_varnames:
            try:
                source = "".join(inspect.getsource(forward).split())
            except OSError:
                return None
            return "arange" if any(counted in source for counted in _ARANGES) else None
    return None


def position_limit(model: Any) -> int | None:
    """The number of positions in the model's table of learned positions; None: it has no table."""
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _TABLES and isinstance(module, nn.Embedding) and module is not words:
            return table_size(module)
    return None


def table_size(table: nn.Embedding) -> int:
    """The number of positions in a table of learned ones, whose first rows may be no positions."""
    return table.num_embeddings - int(getattr(table, "offset", 0))


def shifted_positions(style: str, arguments: dict[str, Any], length: int | Tensor, padding: int | None) -> Tensor:
    """The positions of a call's own tokens, `length` further on than without a prefix: [B or 1, T].

    Args:
        style: of the model's family, for calls without `position_ids`.
        arguments: the call's, by name.
        length: P, or each row's, [B, 1].
        padding: the id of the padding token.
    """
    given = arguments.get("position_ids")
    if given is not None:
        return given + length
    ids = arguments.get("input_ids")
    inputs: Tensor = arguments["inputs_embeds"] if ids is None else ids
    tokens = inputs.shape[1] if ids is None else inputs.shape[-1]
    cache = arguments.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    steps = torch.arange(tokens, device=inputs.device)
    if style == "tokens" and padding is not None:
        if ids is None:  # as in transformers, where embeddings stand at the first positions whatever came before them
            return (steps + padding + 1).unsqueeze(0)
        real = ids.ne(padding).long()
        return (real.cumsum(1) + past + length) * real + padding
    mask = arguments.get("attention_mask")
    if style == "mask" and isinstance(mask, Tensor) and mask.ndim == 2:
        counted = (mask.long().cumsum(-1) + length) * mask.long() - 1
        return counted[:, past:] if isinstance(past, int) else counted.index_select(1, steps + past)
    return (steps + past).unsqueeze(0) + length


def check_positions(positions: Tensor, limit: int | None, name: str) -> None:
    """Raise when a position lies past the model's table. Read on the CPU only: a GPU is never waited for.

    Raises:
        ValueError: prefix and tokens together are longer than the table.
    """
    if limit is None or positions.device.type != "cpu" or torch.compiler.is_compiling() or positions.numel() == 0:
        return
    last = int(positions.max())
    if last >= limit:
        raise ValueError(
            f"{name}: expected prefix and tokens within the model's {limit} positions, got position {last}; shorten the"
            " prefix or the input"
        )
