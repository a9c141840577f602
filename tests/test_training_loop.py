"""A run is a function of its settings: it resumes exactly, owns its folder, and stops where it is told to."""

import json
import os
import signal

import pytest
import torch
from training_inputs import PAIRS, save_tiny_model, tiny_model, tiny_tokenizer, write_pairs

from prefix_fast.patching import patch
from prefix_fast.prefix import PrefixConfig
from prefix_fast.training.collate import RowFormat, RowTokenizer, collate_training
from prefix_fast.training.decoding import generate_texts
from prefix_fast.training.loop import LoopSettings, Trainer, evaluation_loss, make_optimizer, training_step
from prefix_fast.training.run_folder import RunFolder, write_atomically
from prefix_fast.training.session import RunSettings, make_prefix, start_run
from prefix_fast.training.tables import Example

SETTINGS = LoopSettings(steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=2, seed=3, eval_every=2)


def rows():
    return RowTokenizer(tiny_tokenizer(), RowFormat()).rows([Example(s, (t,)) for s, t in PAIRS])


def make_trainer(folder, settings=SETTINGS, dropout=0.1, projection=True):
    """A patched tiny model whose steps draw random numbers."""
    model = tiny_model()
    model.config.attention_dropout = dropout
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    torch.manual_seed(1)
    config = PrefixConfig(num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=8, prefix_dropout=0.1)
    patch(model, config)
    trainer = Trainer(
        *(model, rows(), folder, settings),
        pad_token_id=1,
        save_prefix=model.prefix.save_pretrained,
        eval_rows=rows()[:5],
    )
    return trainer


def parameters(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.named_parameters.items()}


def assert_bitwise_equal(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def metrics(folder):
    """The records without what depends on the clock."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in folder.read_metrics()]


def test_only_the_prefix_is_trained(tmp_path):
    trainer = make_trainer(RunFolder.create(tmp_path / "run", {}, {}))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.run()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trainer.named_parameters)
    assert changed and all(name.startswith("prefix.") for name in changed)


@pytest.mark.parametrize("projection", [True, False])
def test_same_seed_gives_the_same_bits(tmp_path, projection):
    results = []
    for name in "ab":
        trainer = make_trainer(RunFolder.create(tmp_path / name, {}, {}), projection=projection)
        trainer.run()
        results.append((parameters(trainer), metrics(trainer.folder)))
    assert_bitwise_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_run_equals_an_uninterrupted_one_bitwise(tmp_path, stop_after):
    whole = make_trainer(RunFolder.create(tmp_path / "whole", {}, {}))
    whole.run()

    stopped = make_trainer(RunFolder.create(tmp_path / "stopped", {}, {}))
    stopped.on_record = lambda record: os.kill(os.getpid(), signal.SIGINT) if record["step"] == stop_after else None
    result = stopped.run()
    assert result.interrupted and result.step == stop_after
    torch.rand(7)  # what else draws random numbers in between does not matter

    resumed = make_trainer(RunFolder.open(tmp_path / "stopped"))
    resumed.resume()
    assert not resumed.run().interrupted
    assert_bitwise_equal(parameters(whole), parameters(resumed))
    assert metrics(whole.folder) == metrics(resumed.folder)


def test_resume_forgets_steps_after_the_checkpoint(tmp_path):
    settings = LoopSettings(steps=5, batch_size=4, seed=3, save_every=2)
    whole = make_trainer(RunFolder.create(tmp_path / "whole", {}, {}), settings)
    whole.run()
    crashed = make_trainer(RunFolder.create(tmp_path / "crashed", {}, {}), settings)

    def crash(record):
        if record["step"] == 3:
            raise MemoryError

    crashed.on_record = crash
    with pytest.raises(MemoryError):
        crashed.run()
    resumed = make_trainer(RunFolder.open(tmp_path / "crashed"), settings)
    resumed.resume()
    assert resumed.step == 2
    resumed.run()
    assert_bitwise_equal(parameters(whole), parameters(resumed))
    assert metrics(whole.folder) == metrics(resumed.folder)


def test_accumulated_batches_give_the_gradient_of_one_large_batch():
    model = patch(tiny_model(), PrefixConfig(num_virtual_tokens=3, prefix_projection=False))
    model.train()
    chosen = list(model.prefix.parameters())
    optimizer, _ = make_optimizer(chosen, LoopSettings(steps=1))
    chunks = [rows()[:1], rows()[1:6]]
    gradients = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in chosen]))
    losses = []
    start = [p.detach().clone() for p in chosen]
    for batches in (chunks, [chunks[0] + chunks[1]]):
        stats = training_step(model, [collate_training(chunk, 1) for chunk in batches], chosen, optimizer, 1e9)
        losses.append(stats.loss)
        with torch.no_grad():
            for p, value in zip(chosen, start, strict=True):
                p.copy_(value)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for split, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-4)


def test_evaluation_loss_is_the_mean_over_target_tokens():
    model = patch(tiny_model(), 4)
    model.train()
    chunks = [collate_training(rows()[:2], 1), collate_training(rows()[2:7], 1)]
    whole = collate_training(rows()[:7], 1)
    assert evaluation_loss(model, chunks) == pytest.approx(evaluation_loss(model, [whole]), abs=1e-5)
    assert model.training


def test_loss_falls(tmp_path):
    settings = LoopSettings(steps=30, batch_size=8, learning_rate=0.2, schedule="constant")
    trainer = make_trainer(RunFolder.create(tmp_path / "run", {}, {}), settings, dropout=0.0, projection=False)
    everything = [collate_training(rows(), 1)]
    before = evaluation_loss(trainer.model, everything)
    trainer.run()
    assert evaluation_loss(trainer.model, everything) < before - 0.05


def test_run_leaves_settings_metrics_prefix_and_curve(tmp_path):
    trainer = make_trainer(RunFolder.create(tmp_path / "run", {"model": "tiny"}, {"torch": "x"}))
    trainer.run()
    names = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "metrics.jsonl", "prefix", "training_state.pt", "loss.png"}
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {entry.name for entry in (tmp_path / "run" / "prefix").iterdir()} >= {"adapter_model.safetensors"}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"] == {"model": "tiny"}
    assert [record["step"] for record in trainer.folder.read_metrics() if "eval_loss" in record] == [2, 4, 6]


def test_nan_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    trainer = make_trainer(
        RunFolder.create(tmp_path / "run", {}, {}), LoopSettings(steps=4, batch_size=4, save_every=2)
    )

    def spoil(record):
        if record["step"] == 3:
            with torch.no_grad():
                trainer.parameters[0].fill_(float("nan"))

    trainer.on_record = spoil
    with pytest.raises(ValueError, match=r"train: expected a finite loss and gradient, got loss nan .*lower"):
        trainer.run()
    assert trainer.folder.load_state()["step"] == 2


# Refusing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"train: expected steps >= 1, got 0; raise it"),
        ({"batch_size": -1}, r"train: expected batch_size >= 1, got -1; raise it"),
        ({"gradient_accumulation": 0}, r"train: expected gradient_accumulation >= 1, got 0"),
        ({"warmup_steps": -1}, r"train: expected warmup_steps >= 0, got -1; 0 turns it off"),
        ({"learning_rate": float("nan")}, r"train: expected learning_rate > 0 and finite, got nan; correct it"),
        ({"schedule": "zigzag"}, r"train: expected schedule to be one of linear, .*, got 'zigzag'; choose one"),
        ({"max_grad_norm": 0.0}, r"train: expected max_grad_norm > 0 and finite, got 0.0; correct it"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoopSettings(**{"steps": 1, **options})


def test_model_without_trainable_parameters_is_refused(tmp_path):
    model = tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"train: expected parameters that require gradients, got none; patch"):
        Trainer(model, rows(), RunFolder(tmp_path, {}), SETTINGS, pad_token_id=1, save_prefix=print)


def test_folder_of_another_run_is_refused_and_can_be_overwritten(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"seed": 1}, {})
    folder.append_metrics({"step": 1})
    with pytest.raises(ValueError, match=r"holds another run; continue it with --resume, replace it with --overwrite"):
        RunFolder.create(tmp_path / "run", {"seed": 2}, {})
    assert RunFolder.open(tmp_path / "run").settings == {"seed": 1}
    RunFolder.create(tmp_path / "run", {"seed": 2}, {}, overwrite=True)
    assert RunFolder.open(tmp_path / "run").settings == {"seed": 2}
    assert RunFolder.open(tmp_path / "run").read_metrics() == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_with_other_files_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"expected a new or empty folder, got .*, which holds thesis\.tex; choose"):
        RunFolder.create(tmp_path, {}, {}, overwrite=overwrite)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"another run|thesis\.tex"):
        RunFolder.create(tmp_path, {}, {}, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").exists()


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"RunFolder: expected a folder, got the file .*file; choose another --output"):
        RunFolder.create(tmp_path / "file", {}, {})


def test_folder_without_or_with_broken_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected the folder of a run, got .*, which has no run\.json; check it"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text('{"settings"')
    with pytest.raises(ValueError, match=r"expected the settings of a run in .*run\.json, got something else"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_missing_or_truncated_state_is_refused(tmp_path, content):
    folder = RunFolder.create(tmp_path / "run", {}, {})
    if content is not None:
        (folder.path / "training_state.pt").write_bytes(content)
    message = r"nothing was saved to resume from" if content is None else r"got a file that cannot be read"
    with pytest.raises(ValueError, match=message):
        folder.load_state()


def test_pickled_code_in_a_state_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = RunFolder.create(tmp_path / "run", {}, {})
    torch.save({"step": Payload()}, folder.path / "training_state.pt")
    with pytest.raises(ValueError, match=r"got a file that cannot be read"):
        folder.load_state()
    assert not (tmp_path / "owned").exists()


def test_state_of_another_prefix_is_refused(tmp_path):
    make_trainer(RunFolder.create(tmp_path / "run", {}, {})).save()
    other = make_trainer(RunFolder.open(tmp_path / "run"), projection=False)
    with pytest.raises(ValueError, match=r"train: expected the checkpoint in .* to hold .* got .*; resume"):
        other.resume()


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


# Whole runs


def settings_of(tmp_path, **options):
    model = save_tiny_model(tmp_path / "model")
    data = write_pairs(tmp_path / "pairs.jsonl")
    columns = {"source_column": "facts", "target_column": "text"}
    return RunSettings(model=str(model), dataset=str(data), encoder_hidden_size=8, **columns, **options)


def test_epochs_become_steps(tmp_path):
    settings = settings_of(tmp_path, epochs=2, batch_size=5, gradient_accumulation=2)
    assert settings.loop_settings(45).steps == 9
    assert RunSettings(model="m", dataset="d", steps=7).loop_settings(45).steps == 7


def test_failure_before_training_leaves_no_folder(tmp_path):
    settings = settings_of(tmp_path, num_virtual_tokens=3, backend="nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        start_run(settings, tmp_path / "run", say=lambda text: None)
    assert not (tmp_path / "run").exists()


def test_prefix_starts_from_a_text(tmp_path):
    settings = settings_of(tmp_path, init_text="Place 1", prefix_projection=False)
    run = start_run(settings, tmp_path / "run", say=lambda text: None)
    tokens = run.language_model.tokenizer("Place 1").input_ids
    assert run.language_model.model.prefix.num_virtual_tokens == len(tokens)
    again = make_prefix(settings, run.language_model._replace(model=tiny_model()))
    assert torch.equal(again()["decoder"][0], run.language_model.model.prefix()["decoder"][0])


def test_generation_restores_order_and_mode(tmp_path):
    model, tokenizer = patch(tiny_model(), 4), tiny_tokenizer()
    model.train()
    texts = RowTokenizer(tokenizer, RowFormat())
    sources = [source for source, _ in PAIRS[:5]] + ["a"]
    alone = [generate_texts(model, texts, [source], max_new_tokens=6)[0] for source in sources]
    assert generate_texts(model, texts, sources, max_new_tokens=6, batch_size=4) == alone
    assert model.training
    with pytest.raises(ValueError, match=r"generate_texts: expected at least one source text, got none; pass one"):
        generate_texts(model, texts, [], max_new_tokens=6)
