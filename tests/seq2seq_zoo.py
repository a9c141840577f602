"""Tiny random encoder-decoders, batches for them, and an eager reference with the prefix inside keys and values."""

from typing import Any, NamedTuple

import torch
from models_zoo import VOCAB
from torch import Tensor

SITES = ("encoder", "decoder", "cross")
_TOKENS = {
    "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}  # fmt: skip
# The parts differ in layers and heads, so that no site can stand in for another.
_BART = {
    **_TOKENS, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "init_std": 0.2,
}  # fmt: skip
_T5 = {
    **_TOKENS, "d_model": 32, "d_kv": 6, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "d_ff": 48,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "dropout_rate": 0.0,
}  # fmt: skip
_CLASSES = {
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _BART),
    "plbart": ("PLBartConfig", "PLBartForConditionalGeneration", _BART),
    "marian": ("MarianConfig", "MarianMTModel", {**_BART, "decoder_vocab_size": VOCAB}),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", _BART),
    "blenderbot": ("BlenderbotConfig", "BlenderbotForConditionalGeneration", _BART),
    "blenderbot-small": ("BlenderbotSmallConfig", "BlenderbotSmallForConditionalGeneration", _BART),
    "m2m_100": ("M2M100Config", "M2M100ForConditionalGeneration", _BART),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "flan-t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "umt5": ("UMT5Config", "UMT5ForConditionalGeneration", _T5),
}
FAMILIES = tuple(_CLASSES)


def make_seq2seq(family: str = "bart", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A sequence-to-sequence language model in evaluation mode, with a config of its own."""
    import transformers as hf

    config, model_class, sizes = _CLASSES[family]
    torch.manual_seed(seed)
    model = getattr(hf, model_class)(getattr(hf, config)(**{**sizes, **changes})).to(dtype).eval()
    model.generation_config.forced_bos_token_id = None
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "relative_attention_bias.weight")):
            torch.nn.init.normal_(parameter.data, mean=float(name.endswith("norm.weight")), std=0.5)
    return model


class Seq2SeqBatch(NamedTuple):
    """Source tokens [B, S], their padding mask, and labels [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def arguments(self) -> dict[str, Tensor]:
        """As keywords of a forward."""
        return self._asdict()

    def source(self) -> dict[str, Tensor]:
        """Without the labels."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def computed(self) -> Tensor:
        """[B, T], True: a label, or a decoder token made of one; the others are padding behind them."""
        real = self.labels != -100
        return real | torch.nn.functional.pad(real[:, :-1], (1, 0), value=True)


def make_seq2seq_batch(padding: str = "right", rows: int = 3, source: int = 7, target: int = 5) -> Seq2SeqBatch:
    """A batch whose sources are padded "left", "right" or not ("none") and whose labels end at different places."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (rows, source), generator=generator)
    labels = torch.randint(3, VOCAB, (rows, target), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        if padding != "none":
            labels[row, -row:] = -100
            part = slice(None, 2 * row) if padding == "left" else slice(-2 * row, None)
            mask[row, part] = 0
    return Seq2SeqBatch(ids.masked_fill(mask == 0, 2), mask, labels)


def make_site_prefix(model: Any, length: int = 4, sites: tuple[str, ...] | None = None, scale: float = 1.0) -> Any:
    """A direct prefix with random keys and values at the sites (None: all)."""
    from prefix_fast.prefix import Prefix, PrefixConfig

    torch.manual_seed(1)
    prefix = Prefix(PrefixConfig(length, prefix_projection=False, sites=sites), model.config)
    for parameter in prefix.parameters():
        parameter.data *= scale
    return prefix


def attentions(model: Any) -> dict[str, list[Any]]:
    """The attention modules of each site, by their names in transformers."""
    found: dict[str, list[Any]] = {site: [] for site in SITES}
    for name, module in model.named_modules():
        if name.endswith(("encoder_attn", "EncDecAttention")):
            found["cross"].append(module)
        elif name.endswith(("self_attn", "SelfAttention")):
            found["encoder" if "encoder." in name else "decoder"].append(module)
    return found


def reference(model: Any, prefix: Any) -> Any:
    """The unpatched model with the prefix concatenated to the keys and values, and its decoder's positions shifted.

    Its keys and values are `prefix()`'s at the time of the call, so that gradients flow into the prefix.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register("prefix_reference", _reference_attention)
    AttentionMaskInterface.register("prefix_reference", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation("prefix_reference")
    for site, modules in attentions(model).items():
        for layer, module in enumerate(modules):
            if site in prefix.sites:
                module.__dict__["reference_prefix"] = (prefix, site, layer)
                own = getattr(module, "has_relative_attention_bias", False)
                module.__dict__["reference_bias"] = module if own else modules[0]
    if "decoder" in prefix.sites and hasattr(model.get_decoder(), "embed_positions"):
        length = prefix.num_virtual_tokens

        def shift(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if kwargs.get("position_ids") is not None:
                return args, {**kwargs, "position_ids": kwargs["position_ids"] + length}
            return (*args[:-1], args[-1] + length), kwargs

        model.get_decoder().embed_positions.register_forward_pre_hook(shift, with_kwargs=True)
    return model


def _reference_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float,
    dropout: float = 0.0, position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    rows, own = key.shape[0], key.shape[2]
    length = 0
    if "reference_prefix" in module.__dict__:
        prefix, site, layer = module.__dict__["reference_prefix"]
        length = prefix.num_virtual_tokens
        pair = (states[layer].to(key.dtype).expand(rows, -1, -1, -1) for states in prefix()[site])
        key, value = (
            torch.cat([states, own_states], dim=2) for states, own_states in zip(pair, (key, value), strict=True)
        )
        if position_bias is not None and site != "cross":
            past = own - query.shape[2] if site == "decoder" else 0
            biased = module.__dict__["reference_bias"]
            position_bias = biased.compute_bias(query.shape[2], length + own, past_seen_tokens=past + length)
        elif position_bias is not None:
            assert not position_bias.any()
            position_bias = None
    scores = query @ key.transpose(2, 3) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        scores = scores + torch.nn.functional.pad(mask, (length, 0))
    weights = torch.nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


def make_whisper(**changes: Any) -> Any:
    """A speech model of 7 encoder positions (14 frames of 5 mel bins) in evaluation mode."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {name: value for name, value in _BART.items() if name not in ("max_position_embeddings",)}
    sizes |= {"max_source_positions": 7, "max_target_positions": 24, "num_mel_bins": 5, "suppress_tokens": None}
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(
        WhisperConfig(**{**sizes, "begin_suppress_tokens": None, "max_length": None, **changes})
    ).eval()
