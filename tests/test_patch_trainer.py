"""Files of patched models, and transformers' Trainer: checkpoints of the prefix alone, resuming, the best model."""

import json
import logging

import pytest
import torch
from models_zoo import assert_close, make_batch, make_model, make_peft, make_prefix
from safetensors.torch import load_file

from prefix_fast.patching import patch, unpatch
from prefix_fast.prefix import Prefix, PrefixConfig


def rows(count=8):
    batch = make_batch("none", rows=count, tokens=7)
    return [{"input_ids": ids, "labels": ids.clone()} for ids in batch.input_ids]


def make_trainer(model, folder, **options):
    from transformers import Trainer, TrainingArguments

    options = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        **options,
    }
    data = rows()
    return Trainer(
        model=model, args=TrainingArguments(str(folder), **options), train_dataset=data, eval_dataset=data[:2]
    )


def checkpointing_option():
    """Trainer's name for gradient checkpointing, which newer releases of transformers have changed."""
    from transformers import TrainingArguments

    name = "activation_checkpointing"
    return name if name in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def start(projection=True):
    torch.manual_seed(3)
    return patch(
        make_model("llama"), PrefixConfig(5, prefix_projection=projection, encoder_hidden_size=8, prefix_dropout=0.1)
    )


def test_saved_folder_holds_the_prefix_alone(tmp_path):
    model, batch = start(), make_batch("left")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "model.safetensors",
    ]
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == {name for name in model.state_dict() if name.startswith("prefix.")}
    again = patch(make_model("llama"), tmp_path)
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    assert_close(again(**arguments).logits, model.eval()(**arguments).logits, 1e-5)
    patch(again, Prefix.from_pretrained(str(tmp_path)))
    assert_close(again(**arguments).logits, model(**arguments).logits, 1e-5)


def test_peft_reads_the_saved_folder(tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = make_model("llama"), make_batch("left")
    patch(model, make_prefix(model)).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path)
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    assert_close(model(**arguments).logits, theirs(**arguments).logits)


def test_model_that_is_trained_too_is_saved_whole(tmp_path):
    from transformers import AutoModelForCausalLM

    model, batch = make_model("llama"), make_batch("left")
    patch(model, make_prefix(model), freeze=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert "prefix_fast" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    logging.disable(logging.WARNING)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    logging.disable(logging.NOTSET)
    patch(again, tmp_path / "prefix")
    assert_close(again(batch.input_ids).logits, model(batch.input_ids).logits, 1e-6)


def test_state_dict_goes_round():
    model, batch = start(), make_batch("left")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = patch(make_model("llama", seed=9), model.prefix.config)
    other.load_state_dict(state)
    assert_close(other.eval()(batch.input_ids).logits, model.eval()(batch.input_ids).logits, 1e-6)
    plain = {name for name in state if not name.startswith("prefix.")}
    assert plain == set(make_model("llama").state_dict())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_resumed_training_equals_uninterrupted(tmp_path, checkpointing, caplog):
    options = {checkpointing_option(): True} if checkpointing else {}
    whole = make_trainer(start(), tmp_path / "whole", **options)
    whole.train()
    half = make_trainer(start(), tmp_path / "half", **options)
    half.args.max_steps = 2
    half.train()
    again = make_trainer(start(), tmp_path / "half", **options)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert not [record for record in caplog.records if "missing keys" in record.message]
    assert losses(again)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-4)
    for ours, theirs in zip(again.model.prefix.parameters(), whole.model.prefix.parameters(), strict=True):
        assert_close(ours, theirs)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert not (checkpoint / "config.json").exists()
    assert all(name.startswith("prefix.") for name in load_file(checkpoint / "model.safetensors"))


def test_best_model_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        start(),
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        save_total_limit=None,
    )
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    now = trainer.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in best.items())
    assert trainer.state.best_global_step == 1


def test_trainer_keeps_the_columns_and_counts_the_items(tmp_path):
    model = make_model("llama")
    patch(model, make_prefix(model))
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=2, max_steps=2, bf16=True)
    trainer.train()
    plain = make_model("llama")
    patch(plain, make_prefix(plain), fused_loss=False)
    expected = make_trainer(plain, tmp_path / "plain", gradient_accumulation_steps=2, max_steps=2, bf16=True)
    expected.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-2)


def test_trainer_with_peft_model_saves_the_same_files(tmp_path):
    pytest.importorskip("peft")
    for name in ("theirs", "ours"):
        model = make_peft("llama", prefix_projection=True)
        model = patch(model) if name == "ours" else model
        make_trainer(model, tmp_path / name).train()
    ours, theirs = (tmp_path / name / "checkpoint-4" for name in ("ours", "theirs"))
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor, 1e-3)


def test_patched_model_in_training_can_be_unpatched():
    model = start().train()
    unpatch(model)
    assert model.training and not hasattr(model, "prefix")
