"""generate of a patched PeftModel: the tokens of the unpatched one, and ways of generating that PEFT cannot."""

import copy

import pytest
import torch
from models_zoo import make_batch, make_model, make_peft

from prefix_fast.patching import patch

pytest.importorskip("peft")
NEW = 6
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "no cache": {"do_sample": False, "use_cache": False},
}


def generate(model, batch, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 2, **options}
    return model.eval().generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen3", "gpt_neox"])
def test_tokens_equal_peft(family, way):
    theirs, batch = make_peft(family, prefix_projection=way == "greedy"), make_batch("left")
    ours = patch(copy.deepcopy(theirs))
    assert torch.equal(generate(ours, batch, **WAYS[way]), generate(theirs, batch, **WAYS[way]))


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_window_tokens_equal_peft(family):
    theirs, batch = make_peft(family), make_batch("none")
    theirs.base_model.set_attn_implementation("eager")
    ours = patch(copy.deepcopy(theirs))
    assert torch.equal(generate(ours, batch), generate(theirs, batch))


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"assistant": True}, {"prefill_chunk_size": 4}],
    ids=["static", "assisted", "chunked"],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ways_that_peft_cannot(family, options):
    model = patch(make_peft(family))
    batch = make_batch("none", rows=1)
    options = dict(options)
    if options.pop("assistant", False):
        options["assistant_model"] = make_model(family, seed=1)
    assert torch.equal(generate(model, batch, **options), generate(model, batch))


def test_prefix_is_computed_once_per_generation(monkeypatch):
    model, batch = patch(make_peft("gpt2", prefix_projection=True)), make_batch("left")
    calls = []
    encoder = model.prompt_encoder["default"]
    encoder.register_forward_hook(lambda *_: calls.append(0))
    generate(model, batch)
    assert len(calls) == 1
