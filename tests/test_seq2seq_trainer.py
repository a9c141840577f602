"""Seq2SeqTrainer with a patched encoder-decoder: losses, label smoothing, generation, checkpoints, resuming."""

import pytest
import torch
from models_zoo import assert_close, twin
from safetensors.torch import load_file
from seq2seq_zoo import attentions, make_seq2seq, make_seq2seq_batch, make_site_prefix, reference

from prefix_fast.patching import patch
from prefix_fast.prefix import Prefix, PrefixConfig


def make_trainer(model, folder, **options):
    from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments

    batch = make_seq2seq_batch("right", rows=8, source=20, target=12)
    decoder = model.prepare_decoder_input_ids_from_labels(batch.labels)
    fields = {**batch.arguments(), "decoder_input_ids": decoder}
    data = [{name: value[row] for name, value in fields.items()} for row in range(8)]
    generation = GenerationConfig(max_new_tokens=4, num_beams=2, decoder_start_token_id=0, pad_token_id=2)
    options = {
        "per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "learning_rate": 0.02, "report_to": [],
        "lr_scheduler_type": "constant", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "predict_with_generate": True, "generation_config": generation, **options,
    }  # fmt: skip
    arguments = Seq2SeqTrainingArguments(str(folder), **options)
    return Seq2SeqTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4])


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def unpatched_with(prefix, family):
    """The eager reference with `prefix` as its only trained module."""
    model = make_seq2seq(family)
    model.requires_grad_(False)
    model.register_module("its_prefix", prefix)
    return reference(model, prefix)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_losses_equal_concatenation(tmp_path, family, smoothing):
    model = make_seq2seq(family)
    prefix = make_site_prefix(model, 4)
    theirs = make_trainer(unpatched_with(twin(prefix), family), tmp_path / "theirs", label_smoothing_factor=smoothing)
    ours = make_trainer(patch(model, prefix), tmp_path / "ours", label_smoothing_factor=smoothing)
    for trainer in (theirs, ours):
        trainer.args.save_strategy = "no"
        trainer.train()
    assert len(losses(ours)) == 4
    assert_close(losses(ours), losses(theirs), 1e-4)
    for name, parameter in theirs.model.its_prefix.named_parameters():
        assert_close(prefix.get_parameter(name), parameter)


def test_prediction_generates_with_the_prefix(tmp_path):
    model = make_seq2seq("bart")
    prefix = make_site_prefix(model, 4)
    theirs = make_trainer(unpatched_with(twin(prefix), "bart"), tmp_path / "theirs")
    ours = make_trainer(patch(model, prefix), tmp_path / "ours")
    found, expected = (trainer.predict(trainer.eval_dataset) for trainer in (ours, theirs))
    assert (found.predictions == expected.predictions).all()
    assert abs(found.metrics["test_loss"] - expected.metrics["test_loss"]) < 1e-5


def test_checkpoint_holds_the_prefix_alone_and_resumes(tmp_path):
    def start():
        torch.manual_seed(3)
        return patch(make_seq2seq("bart"), PrefixConfig(4, encoder_hidden_size=8))

    whole = make_trainer(start(), tmp_path / "whole")
    whole.train()
    stored = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert stored.keys() == {name for name in whole.model.state_dict() if name.startswith("prefix.")}
    assert {name.split(".")[2] for name in stored} == {"encoder", "decoder", "cross"}
    half = make_trainer(start(), tmp_path / "half", max_steps=4)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parameter in whole.model.prefix.named_parameters():
        assert_close(half.model.prefix.get_parameter(name), parameter, 1e-6)
    batch = make_seq2seq_batch("left")
    again = patch(make_seq2seq("bart"), tmp_path / "whole" / "checkpoint-4")
    assert tuple(again.prefix()) == ("encoder", "decoder", "cross")
    assert_close(again(**batch.arguments()).logits, whole.model.eval()(**batch.arguments()).logits, 1e-5)


def test_peft_trainer_is_equal(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM")
    runs = []
    for name in ("theirs", "ours"):
        torch.manual_seed(0)
        model = peft.get_peft_model(make_seq2seq("bart", decoder_attention_heads=4), config)
        trainer = make_trainer(patch(model) if name == "ours" else model, tmp_path / name)
        trainer.train()
        runs.append((losses(trainer), trainer.predict(trainer.eval_dataset, max_new_tokens=4).predictions))
    assert_close(runs[1][0], runs[0][0], 1e-4)
    assert (runs[1][1] == runs[0][1]).all()
    folders = [tmp_path / name / "checkpoint-4" for name in ("theirs", "ours")]
    assert {path.name for path in folders[0].iterdir()} == {path.name for path in folders[1].iterdir()}
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert_close(second["prompt_embeddings"], first["prompt_embeddings"])


def test_folder_of_three_sites(tmp_path):
    model, batch = make_seq2seq("t5"), make_seq2seq_batch("left")
    prefix = make_site_prefix(model, 4)
    patch(model, prefix).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.safetensors", "prefix.safetensors", "prefix_config.json",
    ]  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"it has prefixes at \['cross', 'decoder', 'encoder'\]"):
        prefix.save_pretrained(tmp_path / "peft", format="peft")
    again = patch(make_seq2seq("t5"), tmp_path)
    assert torch.equal(again(**batch.arguments()).logits, model(**batch.arguments()).logits)
    with pytest.raises(ValueError, match="num_kv_heads=8, head_dim=4 at the site 'encoder'"):
        Prefix.from_pretrained(tmp_path, model_config=make_seq2seq("t5", num_heads=8, d_kv=4).config)
    assert len(attentions(model)["cross"]) == prefix.model_sites.geometries["cross"].num_layers


def test_decoder_alone_off_the_map_of_peft_is_native(tmp_path):
    model = make_seq2seq("bart")
    prefix = make_site_prefix(model, 4, ("decoder",))
    with pytest.raises(NotImplementedError, match=r"layers l and l \+ L/2 differ"):
        prefix.save_pretrained(tmp_path, format="peft")
    prefix.save_pretrained(tmp_path)
    again = Prefix.from_pretrained(tmp_path, model_config=model.config)
    assert again.config.sites == ("decoder",)
    torch.testing.assert_close(again()["decoder"], prefix()["decoder"], rtol=0, atol=0)
