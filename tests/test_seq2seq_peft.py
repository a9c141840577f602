"""A patched PeftModelForSeq2SeqLM against the same unpatched: losses, gradients, files, tokens."""

import copy
import pickle

import pytest
import torch
from models_zoo import assert_close
from peft_steps import assert_same_files, assert_same_step, assert_same_training, step
from seq2seq_zoo import make_seq2seq, make_seq2seq_batch

from prefix_fast.patching import patch, unpatch
from prefix_fast.prefix import Prefix

peft = pytest.importorskip("peft")
# PEFT takes the model's width for the heads' together, and the encoder's heads for the decoder's.
BART = {"decoder_attention_heads": 4}
T5 = {"d_kv": 8}
MODELS = {"bart": BART, "mbart": BART, "marian": BART, "m2m_100": BART, "t5": T5, "mt5": T5}


def make_peft(family, **options):
    base = make_seq2seq(family, **{**MODELS[family], **options.pop("changes", {})})
    torch.manual_seed(0)
    options = {"num_virtual_tokens": 5, "task_type": "SEQ_2_SEQ_LM", **options}
    return peft.get_peft_model(base, peft.PrefixTuningConfig(**options))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("projection", [True, False], ids=["projection", "direct"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_three_optimizer_steps_are_equal(family, projection, padding):
    theirs = make_peft(family, prefix_projection=projection, encoder_hidden_size=16)
    ours = patch(copy.deepcopy(theirs))
    assert_same_training(ours, theirs, [make_seq2seq_batch(padding)] * 3)


@pytest.mark.parametrize(
    "layers", [(3, 3), (4, 4), (4, 2), (3, 1)], ids=lambda pair: f"encoder{pair[0]}-decoder{pair[1]}"
)
@pytest.mark.parametrize("family", MODELS)
def test_layers_are_read_as_peft_reads_them(family, layers):
    names = ("num_layers", "num_decoder_layers") if family.endswith("t5") else ("encoder_layers", "decoder_layers")
    theirs = make_peft(family, changes=dict(zip(names, layers, strict=True)))
    ours, batch = patch(copy.deepcopy(theirs)), make_seq2seq_batch("right")
    found, expected = step(ours, batch), step(theirs, batch)
    assert_same_step(found, expected)
    (gradient,) = expected[1].values()
    read = gradient.view(5, layers[0], -1).abs().sum(dim=(0, 2)) > 0
    assert read.tolist() == [
        index in {2 * layer % layers[0] for layer in range(layers[1])} for index in range(layers[0])
    ]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_arguments_as_peft_takes_them(family):
    theirs = make_peft(family)
    ours, batch = patch(copy.deepcopy(theirs)), make_seq2seq_batch("right")
    mask = (batch.labels != -100).long()
    decoder = {"decoder_input_ids": batch.labels.clamp(min=2), "decoder_attention_mask": mask}
    assert_same_step(step(ours, batch, **decoder), step(theirs, batch, **decoder))
    for model in (ours, theirs):
        model.eval()
    source = (batch.input_ids, batch.attention_mask, None, decoder["decoder_input_ids"], mask)
    assert_close(ours(*source).logits, theirs(*source).logits, 1e-5)
    assert_close(ours(*source, return_dict=False)[0], theirs(*source, return_dict=False)[0], 1e-5)


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beam", "sample"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", MODELS)
def test_tokens_are_equal(family, padding, way):
    theirs = make_peft(family).eval()
    ours, batch = patch(copy.deepcopy(theirs)), make_seq2seq_batch(padding)
    options = {"max_new_tokens": 8, "min_new_tokens": 6, "no_repeat_ngram_size": 1, "do_sample": False, **way}
    torch.manual_seed(0)
    expected = theirs.generate(**batch.source(), **options)
    torch.manual_seed(0)
    assert torch.equal(ours.generate(**batch.source(), **options), expected)
    assert ours._prefix_fast_peft.states is None


@pytest.mark.parametrize("projection", [True, False], ids=["projection", "direct"])
def test_saved_files_are_equal_byte_for_byte(tmp_path, projection):
    theirs = make_peft("bart", prefix_projection=projection)
    ours = patch(copy.deepcopy(theirs))
    assert_same_files(tmp_path, ours, theirs)
    loaded = peft.PeftModel.from_pretrained(make_seq2seq("bart", **BART), tmp_path / "ours")
    batch = make_seq2seq_batch("left")
    expected = loaded(**batch.arguments()).logits
    assert_close(patch(loaded)(**batch.arguments()).logits, expected, 1e-5)


def test_disabled_adapter_is_the_base_model():
    model, batch = make_peft("bart").eval(), make_seq2seq_batch("left")
    base = make_seq2seq("bart", **BART)
    patch(model)
    options = {"max_new_tokens": 5, "do_sample": False}
    with model.disable_adapter():
        assert torch.equal(model(**batch.arguments()).logits, base(**batch.arguments()).logits)
        assert torch.equal(model.generate(**batch.source(), **options), base.generate(**batch.source(), **options))
    assert not torch.equal(model(**batch.arguments()).logits, base(**batch.arguments()).logits)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_unpatch_and_copies(family):
    model, batch = make_peft(family).eval(), make_seq2seq_batch("left")
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    expected = model(**batch.arguments()).logits
    found = patch(model)(**batch.arguments()).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch.arguments()).logits, found)
    unpatch(model)
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == before
    assert torch.equal(model(**batch.arguments()).logits, expected)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_files_of_peft_are_read_by_a_patched_model_and_written_back(tmp_path, family):
    theirs, batch = make_peft(family).eval(), make_seq2seq_batch("right")
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(**batch.arguments()).logits
    model = make_seq2seq(family, **MODELS[family])
    patch(model, tmp_path / "theirs")
    assert model.prefix.config.sites == ("decoder",) and model.prefix.geometry.num_layers == 2
    assert_close(model(**batch.arguments()).logits, expected, 1e-5)


def test_prefix_on_the_map_is_written_for_peft(tmp_path):
    changes = {**BART, "decoder_layers": 3}
    theirs, batch = make_peft("bart", changes={"decoder_layers": 3}).eval(), make_seq2seq_batch("right")
    theirs.save_pretrained(tmp_path / "theirs")
    prefix = Prefix.from_pretrained(tmp_path / "theirs")
    prefix.save_pretrained(tmp_path / "ours", format="peft")
    loaded = peft.PeftModel.from_pretrained(make_seq2seq("bart", **changes), tmp_path / "ours")
    assert_close(loaded(**batch.arguments()).logits, theirs(**batch.arguments()).logits, 1e-6)


def test_peft_models_that_cannot_be_patched():
    base = make_seq2seq("bart", **BART)
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="FEATURE_EXTRACTION"))
    with pytest.raises(NotImplementedError, match=r"PeftModelForSeq2SeqLM .* got PeftModelForFeatureExtraction"):
        patch(model)
    short = make_peft("bart", num_layers=1)
    with pytest.raises(ValueError, match="num_layers=2, got one with num_layers=1"):
        patch(short)
