"""The command: train, resume, eval, generate on a tiny model; what users get wrong is one line and exit code 2."""

import json
import re

import pytest
import torch
from training_inputs import save_tiny_model, tiny_tokenizer, write_pairs
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from prefix_fast import cli
from prefix_fast.training import loop


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model")
    write_pairs(folder / "pairs.jsonl")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def train(inputs, output, *more):
    return invoke(
        *("train", "--model", inputs / "model", "--dataset", inputs / "pairs.jsonl", "--output", output),
        *("--source-column", "facts", "--target-column", "text", "--num-virtual-tokens", 4),
        *("--encoder-hidden-size", 8, "--batch-size", 4, "--steps", 4, *more),
    )


def records(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def error_of(result):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def test_train_eval_generate(inputs, tmp_path):
    output = tmp_path / "run"
    result = train(inputs, output)
    assert result.exit_code == 0, result.output
    assert "23 training rows, 1 held out; a prefix of 4 tokens" in result.output
    assert "training 4/4 loss" in result.output and "tokens/s" in result.output
    assert json.loads((output / "run.json").read_text())["settings"]["num_virtual_tokens"] == 4

    result = invoke("eval", "--run", output, "--max-new-tokens", 5)
    assert result.exit_code == 0, result.output
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert set(evaluation["scores"]) == {"bleu", "chrf", "rouge1", "rouge2", "rougeL"}
    assert all(0 <= score <= 100 for score in evaluation["scores"].values())
    (prediction,) = map(json.loads, (output / "predictions.jsonl").read_text().splitlines())
    assert set(prediction) == {"source", "prediction", "references"}

    result = invoke(
        "eval", "--run", output, "--max-new-tokens", 2, "--dataset", inputs / "pairs.jsonl", "--examples", 9
    )
    assert result.exit_code == 0 and len((output / "predictions.jsonl").read_text().splitlines()) == 9

    result = invoke("generate", "--run", output, "--json", "--max-new-tokens", 5, "name[x]", "area[y]")
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["source"] for line in result.stdout.splitlines()] == ["name[x]", "area[y]"]
    result = invoke("generate", "--run", output, "--max-new-tokens", 5)
    assert result.exit_code == 0 and "reference: Place" in result.stdout


def test_interrupted_run_says_how_to_resume_and_then_equals_a_whole_one(inputs, tmp_path, monkeypatch):
    assert train(inputs, tmp_path / "whole").exit_code == 0
    step_itself, steps_done = loop.training_step, []

    def interrupted_step(*arguments):
        stats = step_itself(*arguments)
        steps_done.append(stats)
        if len(steps_done) == 2:
            import signal

            signal.raise_signal(signal.SIGINT)
        return stats

    with monkeypatch.context() as patched:
        patched.setattr(loop, "training_step", interrupted_step)
        result = train(inputs, tmp_path / "run")
    assert result.exit_code == 130
    assert "Stopped after step 2 and saved" in result.output
    assert "prefix-fast train --resume --output" in " ".join(result.output.split())
    result = invoke("train", "--resume", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    left, right = (torch.load(tmp_path / name / "training_state.pt", weights_only=True) for name in ("run", "whole"))
    assert all(torch.equal(left["parameters"][name], right["parameters"][name]) for name in right["parameters"])


def test_half_precision_accumulation_and_text_start(inputs, tmp_path):
    result = invoke(
        *("train", "--model", inputs / "model", "--dataset", inputs / "pairs.jsonl", "--output", tmp_path / "run"),
        *("--source-column", "facts", "--target-column", "text", "--init-text", "Place 1", "--no-prefix-projection"),
        *("--steps", 2, "--batch-size", 2, "--gradient-accumulation", 2, "--compute-dtype", "bfloat16"),
    )
    assert result.exit_code == 0, result.output
    state = torch.load(tmp_path / "run" / "training_state.pt", weights_only=True)
    assert {tensor.dtype for tensor in state["parameters"].values()} == {torch.float32}
    assert invoke("generate", "--run", tmp_path / "run", "--max-new-tokens", 3, "a").exit_code == 0


def test_output_with_another_run_is_refused(inputs, tmp_path):
    assert train(inputs, tmp_path / "run").exit_code == 0
    assert "which holds another run; continue it with --resume" in error_of(train(inputs, tmp_path / "run"))
    assert train(inputs, tmp_path / "run", "--overwrite").exit_code == 0


def test_rows_beyond_the_position_table_are_refused_before_the_run(inputs, tmp_path):
    config = GPT2Config(vocab_size=300, n_positions=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    error = error_of(train(inputs, tmp_path / "run", "--model", tmp_path / "gpt2", "--num-virtual-tokens", 35))
    assert re.search(r"expected prefix and row to fit the model's 40 positions, got 35 \+ \d+; lower", error)
    assert not (tmp_path / "run").exists()


def test_resume_with_other_settings_is_refused(inputs, tmp_path):
    assert train(inputs, tmp_path / "run").exit_code == 0
    error = error_of(invoke("train", "--resume", "--output", tmp_path / "run", "--learning-rate", "0.5", "--steps", 4))
    assert re.search(r"own settings with --resume, got --learning-rate 0\.5 \(the run has 0\.001\); leave", error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--output", "x"), "train: expected --model and --dataset, got only one or none"),
        (("train", "--output", "x", "--resume"), "expected the folder of a run, got x, which has no run.json"),
        (
            ("train", "--output", "x", "--model", "m", "--dataset", "imdb"),
            "expected e2e, webnlg, dart, xsum, scitldr, pydoc",
        ),
        (("eval", "--run", "nowhere"), "expected the folder of a run, got nowhere, which has no run.json; check it"),
        (("generate", "--run", "nowhere", "text"), "expected the folder of a run, got nowhere"),
        (("bench", "--dtype", "int8"), "bench: expected --dtype to be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(invoke(*arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--source-column", "mr"), "expected a column 'mr' in pairs.jsonl, line 1 has ['facts', 'text']"),
        (("--num-virtual-tokens", 0), "train: expected num_virtual_tokens >= 1, got 0; raise it"),
        (("--learning-rate", -1), "train: expected learning_rate > 0 and finite, got -1.0; correct it"),
        (("--compute-dtype", "float16"), "expected compute_dtype to be one of float32, bfloat16, got 'float16'"),
        (("--device", "abacus"), "train: expected a device such as cpu or cuda, got 'abacus'; correct it"),
        (("--backend", "triton"), "prefix_fast: expected a call that backend='triton' can run"),
        (("--schedule", "zigzag"), "train: expected schedule to be one of linear, cosine"),
        (("--model", "smolm"), "expected 'smollm2-135m', a folder or a hub name of a causal language model"),
    ],
)
def test_bad_settings_are_one_line(inputs, tmp_path, more, message):
    assert message in error_of(train(inputs, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(tmp_path):
    result = invoke("eval", "--run", tmp_path, "--debug")
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("command", ["train", "eval", "generate", "convert", "doctor", "bench"])
def test_every_command_has_help(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_generate_before_training_is_refused(inputs, tmp_path):
    assert train(inputs, tmp_path / "run").exit_code == 0
    for entry in (tmp_path / "run" / "prefix").iterdir():
        entry.unlink()
    (tmp_path / "run" / "prefix").rmdir()
    assert "load_trained: expected a trained prefix in" in error_of(invoke("generate", "--run", tmp_path / "run", "a"))
