"""The demo's comparison: PEFT from the same start makes the same steps and generates the same tokens."""

import copy
from types import SimpleNamespace

import pytest
import torch
from training_inputs import PAIRS, save_tiny_model, tiny_model, tiny_tokenizer

from prefix_fast import demo
from prefix_fast.patching import patch
from prefix_fast.prefix import Prefix, PrefixConfig
from prefix_fast.training.collate import RowFormat, RowTokenizer, collate_generation
from prefix_fast.training.loop import LoopSettings, Trainer
from prefix_fast.training.models import load_language_model
from prefix_fast.training.run_folder import RunFolder
from prefix_fast.training.tables import Example

pytest.importorskip("peft", reason="the demo compares with peft")


@pytest.fixture
def sides(tmp_path):
    """(run, our model, PEFT's model) with the same prefix."""
    base = load_language_model(save_tiny_model(tmp_path / "model")).model
    torch.manual_seed(1)
    prefix = Prefix(PrefixConfig(num_virtual_tokens=5, prefix_projection=False), base.config)
    theirs = demo.peft_model(base, copy.deepcopy(prefix))
    ours = patch(tiny_model(), prefix)
    rows = RowTokenizer(tiny_tokenizer(), RowFormat()).rows([Example(s, (t,)) for s, t in PAIRS])
    trainer = Trainer(
        *(ours, rows, RunFolder(tmp_path, {}), LoopSettings(steps=6, batch_size=4, learning_rate=1e-2)),
        pad_token_id=1,
        save_prefix=ours.prefix.save_pretrained,
    )
    return SimpleNamespace(trainer=trainer), ours, theirs


def test_peft_makes_the_same_steps(sides):
    lines = []
    comparison = demo.compare_training(*sides, 5, lines.append)
    assert len(comparison.our_losses) == len(comparison.peft_seconds) == len(lines) == 5
    assert comparison.largest_difference < 1e-4
    assert len(set(comparison.our_losses)) == 5
    assert comparison.ratio > 0


def test_a_difference_is_noticed(sides):
    run, ours, theirs = sides
    with torch.no_grad():
        next(ours.prefix.parameters()).add_(3.0)
    comparison = demo.compare_training(run, ours, theirs, 2, lambda line: None)
    assert comparison.largest_difference > demo.LOSS_TOLERANCE


def test_both_generate_the_same_tokens(sides):
    _, ours, theirs = sides
    generation = demo.time_generation(ours, theirs, collate_generation([[5, 6, 7], [9]], 1), 1)
    assert generation.same_tokens and generation.rows == 2


def test_demo_uses_e2e_where_a_data_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_DATA", str(tmp_path))
    assert demo.demo_settings(3).dataset == "pydoc"
    (tmp_path / "e2e_nlg").mkdir()
    assert demo.demo_settings(3).dataset == "e2e"
