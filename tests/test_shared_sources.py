"""Batches with shared sources against the ordinary batches of the same texts: losses, gradients, log-probabilities."""

import pytest
import torch
from models_zoo import assert_close, make_model, make_peft, make_prefix, twin
from seq2seq_zoo import make_seq2seq, make_site_prefix
from shared_batches import PAD, make_features, ordinary, shared, source_to_target

from prefix_fast import PrefixBank, SharedSourceCollator
from prefix_fast.models import shared_sources
from prefix_fast.patching import patch


def step(model, batch, **arguments):
    """Loss and gradients by name."""
    model.zero_grad()
    loss = model(**batch, **arguments).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model, features, ours=None, theirs=None):
    """One step of the model with each batch: equal losses and gradients."""
    loss, gradients = step(model, shared(features), **(ours or {}))
    expected_loss, expected = step(twin(model), ordinary(features), **(theirs or ours or {}))
    assert_close(loss, expected_loss, 1e-5)
    assert expected and gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient)


def plain(family, length=5, **options):
    model = make_model(family)
    return patch(model, make_prefix(model, length) if length else 0, **options).train()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "opt", "gpt_neox", "granite"])
def test_step_as_with_ordinary_batch(family):
    assert_same_step(plain(family), make_features())


@pytest.mark.parametrize("groups", [(1,), (5,), (1, 1, 1), (1, 6), (3, 3)], ids=str)
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "sorted"])
def test_groups_of_any_size_in_any_order(groups, shuffled):
    assert_same_step(plain("llama"), make_features(groups, seed=len(groups), shuffled=shuffled))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("length", [0, 5])
def test_trainable_model(family, length):
    assert_same_step(plain(family, length, freeze=False), make_features())


def test_source_of_one_token_and_target_of_one_token():
    features = [{"source_ids": [7], "target_ids": [8]}, {"source_ids": [7], "target_ids": [9, 10]}]
    assert_same_step(plain("gpt2"), features)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projected"])
def test_peft_model(family, projection):
    assert_same_step(patch(make_peft(family, prefix_projection=projection)).train(), make_features())


def test_disabled_adapter_reads_no_prefix():
    model, features = patch(make_peft("llama")).eval(), make_features()
    with model.disable_adapter():
        expected = model(**ordinary(features)).loss
        assert_close(model(**shared(features)).loss, expected, 1e-5)
    assert (model(**shared(features)).loss - expected).abs() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("as_positions", [False, True], ids=["names", "positions"])
def test_bank_shares_sources_of_one_prefix_only(family, as_positions):
    model = make_model(family)
    bank = PrefixBank({"a": make_prefix(model, 3, seed=1), "b": make_prefix(model, 6, seed=2)})
    patch(model, bank).train()
    names = [None, "a", "b", "b", "a", "b", "a"]
    ids = [-1 if name is None else bank.names.index(name) for name in names] if as_positions else names
    features = [{**pair, "prefix_id": chosen} for pair, chosen in zip(make_features((7,)), ids, strict=True)]
    assert shared(features)["source_ids"].shape[0] == 3
    assert_same_step(model, features, theirs={"prefix_ids": ids})


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("arguments", [{"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {}], ids=str)
def test_loss_arguments_as_in_transformers(training, arguments):
    assert_same_step(plain("llama").train(training), make_features(), arguments)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_class_without_a_loss_plan(family):
    model = plain(family) if family != "gemma2" else patch(make_model("gemma2", sliding_window=64), 5).train()
    model._prefix_fast.plan = None
    assert_same_step(model, make_features())


def test_window_that_holds_every_row():
    assert_same_step(patch(make_model("mistral", sliding_window=64), 5).train(), make_features())
    assert_same_step(patch(make_model("gemma2", sliding_window=64), 5).train(), make_features())
    assert_same_step(patch(make_model("gpt_oss", sliding_window=64), 5).train(), make_features())


def test_window_that_a_row_leaves_is_refused():
    with pytest.raises(NotImplementedError, match="within the 6 tokens"):
        patch(make_model("mistral", sliding_window=6), 5)(**shared(make_features()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("rows", [1024, 5], ids=["whole", "parts"])
def test_log_probabilities_in_the_features_order(family, rows, monkeypatch):
    monkeypatch.setattr(shared_sources, "_ROWS", rows)
    model, features = plain(family), make_features()
    batch = ordinary(features)
    found = model(**shared(features), per_token_logps=True)
    logits = twin(model).eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits.log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    expected = logps[batch["labels"][:, 1:] != -100]
    assert found.per_token_logps.shape == (sum(len(feature["target_ids"]) for feature in features),)
    assert_close(found.per_token_logps, expected, 1e-5)
    assert_close(found.loss, -expected.mean(), 1e-5)


@pytest.mark.parametrize("rows", [1024, 5], ids=["whole", "parts"])
def test_gradient_of_log_probabilities(rows, monkeypatch):
    monkeypatch.setattr(shared_sources, "_ROWS", rows)
    model, features = plain("llama"), make_features()
    batch = shared(features)
    del batch["labels"]
    counts = torch.tensor([len(feature["target_ids"]) for feature in features])
    advantages = torch.randn(len(features)).repeat_interleave(counts)
    other = twin(model).eval()
    output = model(**batch, per_token_logps=True)
    assert output.loss is None
    (output.per_token_logps * advantages).sum().backward()
    rows = ordinary(features)
    logps = other(**rows).logits.log_softmax(-1)[:, :-1].gather(2, rows["input_ids"][:, 1:, None])[..., 0]
    (logps[rows["labels"][:, 1:] != -100] * advantages).sum().backward()
    for ours, theirs in zip(model.prefix.parameters(), other.prefix.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


def test_source_is_computed_once():
    model, features = plain("llama"), make_features((8,))
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:-1].numel()))
    model(**shared(features))
    assert seen == [len(features[0]["source_ids"]) + sum(len(feature["target_ids"]) for feature in features)]


@pytest.mark.parametrize("per_token", [False, True])
def test_labels_of_some_target_tokens(per_token):
    model, features = plain("llama"), make_features()
    ours, theirs = shared(features), ordinary(features)
    for row, feature in enumerate(features[:3]):
        ours["labels"][row, 1] = theirs["labels"][row, len(feature["source_ids"])] = -100
    loss, gradients = step(model, ours, per_token_logps=per_token)
    expected_loss, expected = step(twin(model), theirs)
    assert_close(loss, expected_loss, 1e-5)
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient)


@pytest.mark.parametrize("per_token", [False, True])
def test_no_labelled_position(per_token):
    model, batch = plain("gpt2"), shared(make_features())
    batch["labels"].fill_(-100)
    for arguments in ({}, {"num_items_in_batch": 3}):
        loss, gradients = step(model, batch, per_token_logps=per_token, **arguments)
        assert torch.isnan(loss) if not arguments else loss == 0
        assert gradients and all((gradient == 0).all() for gradient in gradients.values())


def test_padding_on_the_left():
    model, features = plain("gpt2"), make_features()
    batch = shared(features)
    expected = model(**batch).loss
    for kind in ("source", "target"):
        widths = batch[f"{kind}_mask"].sum(1).tolist()
        for name in ("ids", "mask"):
            right = batch[f"{kind}_{name}"]
            left = [row.roll(row.shape[0] - width) for row, width in zip(right, widths, strict=True)]
            batch[f"{kind}_{name}"] = torch.stack(left)
    batch["labels"][:, 1:] = batch["target_ids"].masked_fill(~batch["target_mask"], -100)
    assert torch.equal(model(**batch).loss, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends_agree(backend):
    model = make_model("llama")
    assert_same_step(patch(model, make_prefix(model), backend=backend).train(), make_features())


def test_gradient_checkpointing():
    model = plain("llama")
    model.activation_checkpointing_enable()
    assert_same_step(model, make_features())


def test_half_precision_compute(any_half):
    model, features = plain("llama"), make_features()
    expected = model(**shared(features)).loss
    model._prefix_fast.compute_dtype = torch.bfloat16
    loss, gradients = step(model, shared(features))
    assert_close(loss, expected, 0.03)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_trainer_takes_the_collator(tmp_path):
    from transformers import Trainer, TrainingArguments

    features = make_features((3, 2, 3), shuffled=False)
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=0.1,
        lr_scheduler_type="constant", max_grad_norm=0.0, remove_unused_columns=False, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="no", optim="sgd", logging_steps=1, train_sampling_strategy="sequential",
    )  # fmt: skip
    start = plain("llama")
    models = [twin(start), twin(start)]
    for model, collator in zip(models, (SharedSourceCollator(PAD), ordinary), strict=True):
        trainer = Trainer(model, settings, collator, train_dataset=features, eval_dataset=features)
        trainer.train()
        assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    for before, ours, theirs in zip(start.parameters(), *(model.parameters() for model in models), strict=True):
        assert_close(ours - before, theirs - before, 1e-3)
    assert not torch.equal(next(models[0].prefix.parameters()), next(start.prefix.parameters()))


@pytest.mark.parametrize("family", ["bart", "t5", "m2m_100"])
@pytest.mark.parametrize("length", [0, 4])
def test_encoder_decoder_encodes_each_source_once(family, length):
    model, features = make_seq2seq(family), make_features()
    patch(model, make_site_prefix(model, length) if length else 0).train()
    seen = []
    if length:
        other = twin(model)
        (loss, gradients), (expected_loss, expected) = (
            step(each, make(features)) for each, make in ((model, shared), (other, source_to_target))
        )
        assert_close(loss, expected_loss, 1e-5)
        assert expected and gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(gradients[name], gradient)
    model.get_encoder().register_forward_hook(
        lambda module, args, kwargs, out: seen.append(out[0].shape[:2]), with_kwargs=True
    )
    given = shared(features)
    found = model(**given, per_token_logps=True)
    assert seen == [(1, int(given["source_mask"].sum())) if family == "bart" else given["source_ids"].shape]
    batch = source_to_target(features)
    logps = model.eval()(**batch).logits.log_softmax(-1)
    labelled = batch["labels"] != -100
    assert_close(found.per_token_logps, logps[labelled].gather(1, batch["labels"][labelled, None])[:, 0], 1e-5)
    assert_close(found.loss, -found.per_token_logps.mean(), 1e-5)


def test_encoder_decoder_with_a_bank():
    model = make_seq2seq("bart")
    bank = PrefixBank({"a": make_site_prefix(model, 3), "b": make_site_prefix(model, 5, scale=0.5)})
    patch(model, bank).train()
    names = [None, "a", "b", "b", "a", "b", "a"]
    features = [{**pair, "prefix_id": name} for pair, name in zip(make_features((7,)), names, strict=True)]
    loss, gradients = step(model, shared(features))
    expected_loss, expected = step(twin(model), source_to_target(features), prefix_ids=names)
    assert_close(loss, expected_loss, 1e-5)
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient)
