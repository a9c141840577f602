"""Weights of the original Prefix-Tuning code, three sites for BART and one for GPT-2, read and written."""

import re

import pytest
import torch
from models_zoo import assert_close, make_model
from seq2seq_zoo import make_seq2seq, make_seq2seq_batch
from torch import nn

from prefix_fast.patching import patch
from prefix_fast.prefix import Prefix, PrefixConfig

P, WIDTH, MLP = 4, 32, 6
SUFFIXES = {
    "decoder": ("wte", "control_trans"),
    "encoder": ("wte_enc", "control_trans_enc"),
    "cross": ("wte2", "control_trans2"),
}
LAYERS = {"encoder": (3, 4), "decoder": (2, 2), "cross": (2, 2)}


class Original(nn.Module):
    """The module that the original code trains, and its prompt: [2 · L, P, heads, width of a head] of each site."""

    def __init__(self, sites):
        super().__init__()
        torch.manual_seed(2)
        self.sites = sites
        for site in sites:
            embedding, transform = SUFFIXES[site]
            out = LAYERS[site][0] * 2 * WIDTH
            setattr(self, embedding, nn.Embedding(P, WIDTH))
            setattr(self, transform, nn.Sequential(nn.Linear(WIDTH, MLP), nn.Tanh(), nn.Linear(MLP, out)))

    def prompt(self, site):
        embedding, transform = (getattr(self, name) for name in SUFFIXES[site])
        layers, heads = LAYERS[site]
        flat = transform(embedding(torch.arange(P)))
        return flat.view(P, layers * 2, heads, WIDTH // heads).permute(1, 2, 0, 3).split(2)


@pytest.mark.parametrize("sites", [("encoder", "decoder", "cross"), ("decoder",)], ids="-".join)
def test_prompt_of_the_original_module(sites):
    module, model = Original(sites), make_seq2seq("bart")
    prefix = Prefix.from_original(module.state_dict(), model.config)
    assert prefix.config == PrefixConfig(P, encoder_hidden_size=MLP, sites=sites)
    for site, (keys, values) in prefix().items():
        for layer, (key, value) in enumerate(module.prompt(site)):
            assert_close(keys[layer, 0], key, 1e-6)
            assert_close(values[layer, 0], value, 1e-6)
    written = prefix.original_state_dict()
    assert written.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(written[name], tensor)


def test_gpt2_and_a_training_scripts_checkpoint():
    module = Original(("decoder",))
    state = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    prefix = Prefix.from_original({**state, "seq2seq_model.shared.weight": torch.zeros(3)}, make_model("gpt2").config)
    assert prefix.num_virtual_tokens == P and torch.equal(prefix.sites["decoder"].embedding.weight, module.wte.weight)


def test_patched_model_reads_and_trains_it():
    model, batch = make_seq2seq("bart"), make_seq2seq_batch("right")
    prefix = Prefix.from_original(Original(tuple(LAYERS)).state_dict(), model.config)
    patch(model, prefix).train()
    model(**batch.arguments()).loss.backward()
    assert all(parameter.grad.any() for parameter in prefix.parameters())


def without(name):
    return {key: tensor for key, tensor in Original(tuple(LAYERS)).state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (without("control_trans_enc.2.bias"), ValueError, r"without ['control_trans_enc.2.bias']"),
        (without("wte.weight"), ValueError, "got the others ['control_trans.0.bias'"),
        ({}, ValueError, "without ['wte.weight']"),
        ({**without(""), "es.weight": torch.zeros(2)}, ValueError, "got the others ['es.weight']"),
        ({**without(""), "control_trans.4.weight": torch.zeros(2)}, NotImplementedError, "the deeper one"),
        ({**without(""), "wte2.weight": torch.zeros(9, WIDTH)}, ValueError, "(P, width) in [(4, 6), (9, 6)]"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_other_weights_are_refused(state, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Prefix.from_original(state, make_seq2seq("bart").config)


def test_weights_for_another_model_name_the_parameter():
    state = Original(tuple(LAYERS)).state_dict()
    with pytest.raises(ValueError, match=r"'sites.encoder.transform.2.weight' of shape \(256, 6\) .* got \(192, 6\)"):
        Prefix.from_original(state, make_seq2seq("bart", encoder_layers=4).config)
    with pytest.raises(NotImplementedError, match="it has no encoder and no cross attention"):
        Prefix.from_original(state, make_model("gpt2").config)


def test_prefix_that_the_original_code_has_not_is_not_written():
    with pytest.raises(NotImplementedError, match=r"got one with sites\.cross\.keys; save_pretrained writes it"):
        Prefix(PrefixConfig(3, prefix_projection=False), make_seq2seq("bart").config).original_state_dict()
