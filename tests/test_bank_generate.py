"""Generation with a bank: a row's tokens alone and in any batch, beams, draft models, what one generate computes."""

import pytest
import torch
from models_zoo import make_batch, make_model, make_prefix, twin
from seq2seq_zoo import make_seq2seq, make_seq2seq_batch, make_site_prefix

from prefix_fast import Prefix, PrefixBank, patch

NEW = 6
LENGTHS = {"alice": 5, "bob": 1, "nil": 0, "dora": 9}
ROWS = ["dora", None, "alice", "bob", "nil"]
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "all beams returned": {"num_beams": 3, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


def make_bank(model):
    maker = make_site_prefix if model.config.is_encoder_decoder else make_prefix
    return PrefixBank({name: maker(model, size) for name, size in LENGTHS.items()})


def generate(model, batch, rows=slice(None), **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 2, "do_sample": False, **options}
    with torch.no_grad():
        out = model.generate(input_ids=batch.input_ids[rows], attention_mask=batch.attention_mask[rows], **options)
    return out if model.config.is_encoder_decoder else out[:, batch.input_ids.shape[1] :]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bart", "t5", "m2m_100"])
def test_tokens_equal_each_rows_prefix_alone(family, way):
    seq2seq = family in ("bart", "t5", "m2m_100")
    model = make_seq2seq(family) if seq2seq else make_model(family)
    batch = make_seq2seq_batch("left", 5, 11) if seq2seq else make_batch("left", 5, 11)
    bank = make_bank(model)
    singles = [patch(twin(model), 0 if name is None else twin(bank[name])) for name in ROWS]
    expected = [generate(host, batch, slice(row, row + 1), **WAYS[way]) for row, host in enumerate(singles)]
    patch(model, bank)
    assert torch.equal(generate(model, batch, prefix_ids=ROWS, **WAYS[way]), torch.cat(expected))
    order = [3, 0, 4, 1, 2]
    found = generate(model, batch, order, prefix_ids=[ROWS[row] for row in order], **WAYS[way])
    assert torch.equal(found, torch.cat([expected[row] for row in order]))
    assert len({tuple(row) for row in torch.cat(expected).tolist()}) > 1


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_sampling_draws_as_the_same_rows_with_one_prefix(family):
    model = make_seq2seq(family) if family == "bart" else make_model(family)
    batch = make_seq2seq_batch("left") if family == "bart" else make_batch("left")
    bank = make_bank(model)
    single = patch(twin(model), twin(bank["alice"]))
    patch(model, bank)
    options = {"do_sample": True, "top_k": 20, "num_return_sequences": 2}
    found = generate(model, batch, prefix_ids=["alice"] * 3, **options)
    assert found.shape[0] == 6
    assert torch.equal(found, generate(single, batch, **options))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_draft_models_do_not_change_the_tokens(family):
    model, draft = make_model(family), make_model(family, seed=1)
    patch(model, make_bank(model))
    batch = make_batch("none", rows=1)
    expected = generate(model, batch, prefix_ids=["dora"])
    assert torch.equal(generate(model, batch, prefix_ids=["dora"], assistant_model=draft), expected)
    assert torch.equal(generate(model, batch, prefix_ids=["dora"], prompt_lookup_num_tokens=2), expected)


def test_one_generate_reads_each_entry_once_and_no_other(monkeypatch):
    model = make_model("gpt2")
    bank, read = make_bank(model), []
    forward = Prefix.forward
    monkeypatch.setattr(Prefix, "forward", lambda self: read.append(self) or forward(self))
    patch(model, bank)
    generate(model, make_batch("left"), prefix_ids=["dora", "bob", "dora"], num_beams=2)
    assert read == [bank["bob"], bank["dora"]]
    with pytest.raises(ValueError, match="expected prefix_ids"):
        model(make_batch("left").input_ids)


def test_entry_that_a_running_generate_reads_cannot_be_removed():
    from transformers import StoppingCriteria

    model = make_model("gpt2")
    bank = make_bank(model)
    patch(model, bank)
    expected = generate(model, make_batch("left"), prefix_ids=["dora", "bob", None])

    class RemoveMeanwhile(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            with pytest.raises(ValueError, match="'dora', which a running generate"):
                bank.remove("dora")
            if "alice" in bank:
                bank.remove("alice")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    found = generate(model, make_batch("left"), prefix_ids=["dora", "bob", None], stopping_criteria=[RemoveMeanwhile()])
    assert torch.equal(found, expected)
    bank.remove("dora")
    assert bank.names == ["bob", "nil"]


def test_ids_for_beams_instead_of_rows_raise():
    model = make_model("gpt2")
    patch(model, make_bank(model))
    with pytest.raises(ValueError, match="each of the 3 rows, got 6"):
        generate(model, make_batch("left"), prefix_ids=["dora"] * 6, num_beams=2)


def test_encoder_called_alone_reads_its_rows_prefixes():
    model = make_seq2seq("bart")
    patch(model, make_bank(model))
    batch = make_seq2seq_batch("left")
    rows = ["dora", None, "alice"]
    encoded = model.get_encoder()(**batch.source(), prefix_ids=rows)
    whole = model(**batch.arguments(), prefix_ids=rows)
    assert torch.equal(encoded.last_hidden_state, whole.encoder_last_hidden_state)
    given = model(encoder_outputs=encoded, attention_mask=batch.attention_mask, labels=batch.labels, prefix_ids=rows)
    assert torch.equal(given.logits, whole.logits)
