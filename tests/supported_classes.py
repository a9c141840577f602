"""What `patch` does with every language model class of the installed transformers; writes SUPPORTED.md.

    python -I tests/supported_classes.py            print the outcomes
    python -I tests/supported_classes.py --write    write SUPPORTED.md

A class is tried on a tiny config with random weights. Equal: logits, loss and the prefix's gradients of a training step
are those of the unpatched model with the prefix in its own past_key_values, and a forward without a cache gives the
logits of one token after the other with a cache. Refused: `patch` raises, with the reason. Anything else is an error.
"""

import copy
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
import transformers as hf
from models_zoo import VOCAB, assert_close, make_batch, with_prefix_mask
from transformers.models.auto import modeling_auto

from prefix_fast.patching import patch
from prefix_fast.prefix import PrefixConfig

FILE = Path(__file__).parent.parent / "SUPPORTED.md"
P = 5
NOT_TRIED = "not tried: "
SITE = PrefixConfig(P, prefix_projection=False, sites=("decoder",))
LARGEST = 90_000_000  # parameters of a model that is made and run
SIZES = {
    "vocab_size": VOCAB, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "d_ff": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_decoder_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "d_kv": 8, "max_position_embeddings": 128, "n_positions": 128, "sliding_window": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "hidden_size_per_layer_input": 8, "mamba_n_heads": 4, "mamba_d_state": 8, "state_size": 8,
    "blank_token_id": VOCAB - 1, "initializer_range": 0.2, "init_std": 0.2, "is_decoder": True,
    **dict.fromkeys(
        (
            "dropout", "dropout_rate", "attention_dropout", "activation_dropout", "hidden_dropout", "residual_dropout",
            "hidden_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "resid_pdrop", "embd_pdrop",
            "encoder_layerdrop", "decoder_layerdrop", "layerdrop", "resid_dropout", "embed_dropout",
            "router_jitter_noise",
        ),
        0.0,
    ),
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": 2 * ["sliding_attention", "full_attention"],
}
MORE: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_asr": {
        "encoder_config": {
            "model_type": "parakeet_encoder",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "num_attention_heads": 4,
        }
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": _SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "reformer": {"axial_pos_embds_dim": (16, 16)},
    "kyutai_speech_to_text": {"num_codebooks": 2, "codebook_vocab_size": 31, "audio_pad_token_id": 100},
    "zamba": {"num_hidden_layers": 8},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


# Classes of which this transformers cannot make a model here.
UNMADE = {
    "Gemma3nForConditionalGeneration": "needs the package timm",
    "Gemma4AssistantForCausalLM": "its config asks for a text part that transformers refuses to make",
    "Gemma4UnifiedAssistantForCausalLM": "as Gemma4AssistantForCausalLM",
}


class Tried(NamedTuple):
    """A class and what came of it."""

    name: str
    outcome: str  # "equal", or the reason for which it is refused


def classes() -> list[str]:
    """The name of every causal and sequence-to-sequence language model class."""
    names: dict[str, None] = {}
    for mapping in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"):
        names.update(dict.fromkeys(getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()))
    return list(names)


def tiny_config(config_class: Any) -> Any:
    """The class's default config, and those within it, with every size that they have made small."""
    renamed = config_class.attribute_map
    more = MORE.get(config_class.model_type, {})
    known = config_class().to_dict().keys() | renamed.keys()
    sizes = {name: size for name, size in SIZES.items() if name in known and renamed.get(name) not in SIZES}
    inner = {name: part for name, part in config_class.sub_configs.items() if getattr(part, "model_type", "")}
    parts = {name: tiny_config(part) for name, part in inner.items()}
    return config_class(**{**parts, **sizes, **more})


def make(name: str) -> Any:
    """A tiny model with random weights; where a class cannot be made so small, one of its default size without any."""
    model_class = getattr(hf, name)
    try:
        config = tiny_config(model_class.config_class)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError, RuntimeError):
        count = LARGEST + 1
    if count > LARGEST:
        with torch.device("meta"):
            return model_class(model_class.config_class())
    if getattr(config, "is_encoder_decoder", False):
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    model = model_class(config).eval()
    for weight, parameter in model.named_parameters():
        if weight.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter.data, mean=float(weight.endswith("norm.weight")), std=0.2)
    if hasattr(model, "set_default_language"):
        model.set_default_language("en_XX")
    return model


def outcome(name: str) -> str:
    """ "equal", the reason for which `patch` refuses the class, or that it could not be tried.

    Raises:
        AssertionError: other numbers. Any other error: the class can neither be run nor is it refused.
    """
    try:
        model = make(name)
    except Exception:
        if name in UNMADE:
            return NOT_TRIED + UNMADE[name]
        raise
    theirs = copy.deepcopy(model)
    try:
        patch(model, SITE)
    except (NotImplementedError, ValueError) as error:
        if "on the meta device" in str(error):
            raise
        return reason(error)
    for padding in ("left", "right"):
        assert_same_step(model, theirs, padding)
    assert_same_with_cache(model)
    return "equal"


def reason(error: Exception) -> str:
    """The error's message in a table's cell."""
    message = str(error).removeprefix("patch: ").removeprefix("model_geometry: ")
    return message.removesuffix("; it cannot be patched").removesuffix("; use another model").replace("|", "/")


def batch_of(model: Any, padding: str = "right") -> dict[str, Any]:
    """Inputs and labels."""
    batch = make_batch(padding, tokens=7)
    if model.main_input_name == "input_features":
        features = torch.randn(3, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": features, "labels": batch.labels}
    return batch._asdict()


def assert_same_step(model: Any, theirs: Any, padding: str) -> None:
    """A training step equals that of the unpatched model whose cache holds the prefix."""
    model.zero_grad()
    site = model.prefix.sites["decoder"]
    keys, values = (tensor.detach().clone().requires_grad_() for tensor in (site.keys, site.values))
    seq2seq = model.config.is_encoder_decoder
    cache = hf.DynamicCache() if seq2seq else hf.DynamicCache(config=theirs.config)
    for layer in range(keys.shape[0]):
        pair = (tensor[layer].expand(3, -1, -1, -1).contiguous() for tensor in (keys, values))
        cache.update(*pair, layer)
    torch.manual_seed(1)
    batch = batch_of(model, padding)
    given = {"past_key_values": hf.EncoderDecoderCache(cache, hf.DynamicCache()) if seq2seq else cache}
    if not seq2seq:
        given["attention_mask"] = with_prefix_mask(batch["attention_mask"], P)
    expected = theirs.train()(**{**batch, **given}, use_cache=True)
    expected.loss.backward()
    found = model.train()(**batch)
    found.loss.backward()
    assert_close(found.loss, expected.loss, 1e-5)
    real = batch["labels"] != -100 if seq2seq else batch["attention_mask"].bool()
    assert_close(found.logits[real], expected.logits[real])
    for ours, reference in ((site.keys, keys), (site.values, values)):
        assert ours.grad is not None
        assert_close(ours.grad, reference.grad)


@torch.no_grad()
def assert_same_with_cache(model: Any) -> None:
    """A forward of all tokens gives the logits of one token after the other."""
    batch = {name: tensor for name, tensor in batch_of(model.eval()).items() if name != "labels"}
    ids = make_batch("none", tokens=7).input_ids
    word = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    batch.pop("attention_mask", None)
    whole = model(**{**batch, word: ids}, use_cache=False).logits
    cache, parts = None, []
    for step in (ids[:, :4], *ids[:, 4:].split(1, 1)):
        out = model(**{**batch, word: step}, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert_close(torch.cat(parts, 1), whole)


def try_all(chosen: list[str]) -> list[Tried]:
    """The outcome of each class; the text of the error where there is one, after "ERROR"."""
    tried = []
    for name in chosen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tried.append(Tried(name, outcome(name)))
            except Exception as error:
                tried.append(Tried(name, f"ERROR {type(error).__name__}: {error}"))
    return tried


def written(tried: list[Tried]) -> str:
    """SUPPORTED.md."""
    equal = sorted(entry.name for entry in tried if entry.outcome == "equal")
    others = sorted(entry for entry in tried if entry.outcome != "equal")
    refused = [entry for entry in others if not entry.outcome.startswith(NOT_TRIED)]
    unmade = [entry for entry in others if entry.outcome.startswith(NOT_TRIED)]
    return "\n".join(
        [
            "# Supported models",
            "",
            f"Every causal and sequence-to-sequence language model of transformers {hf.__version__}, as tried by"
            " `tests/supported_classes.py`, which writes this file:",
            "a tiny model of each class with random weights, patched, against the same model unpatched with the prefix"
            " in its own `past_key_values`.",
            "",
            f"## Equal ({len(equal)})",
            "",
            "Logits, loss and the prefix's gradients of a training step, padded on the left and on the right; a forward"
            " without a cache and one token after the other with a cache.",
            "",
            *(f"- {name}" for name in equal),
            "",
            f"## Refused ({len(refused)})",
            "",
            "| class | `patch` says |",
            "|---|---|",
            *(f"| {name} | {why} |" for name, why in refused),
            "",
            f"## Not tried ({len(unmade)})",
            "",
            *(f"- {name}: {why.removeprefix(NOT_TRIED)}" for name, why in unmade),
            "",
        ]
    )


def main(arguments: list[str]) -> int:
    """Print the outcomes of the classes that are named, or of all; with --write, write the file."""
    hf.logging.set_verbosity_error()
    names = [argument for argument in arguments if not argument.startswith("-")]
    tried = try_all(names or classes())
    for entry in tried:
        print(*entry, sep=" | ")
    if "--write" in arguments:
        FILE.write_text(written(tried))
    return sum(entry.outcome.startswith("ERROR") for entry in tried)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
