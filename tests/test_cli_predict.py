"""`prefix-fast bench --predict CARD` says what it is: a prediction, of which card, on which assumptions."""

import re

import pytest
from typer.testing import CliRunner

from prefix_fast import cli, prediction, speed


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("name", ["H100", "h100", "mi300x"])
def test_predictions_are_labelled_and_list_every_shape(name, monkeypatch):
    monkeypatch.setattr(speed, "measure", None)  # nothing is timed
    result = invoke("--predict", name)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    known, _ = prediction.card_named(name)
    assert f"Prediction from a roofline for {known}, never measured." in text
    assert text.count(f"{known}, predicted µs in bfloat16") == 2
    assert "37.5% (forward) and 30% (backward) of the peak" in text
    for shape in (*prediction.TRAINING, *prediction.DECODING):
        assert prediction.label(shape) in text


def test_figures_are_those_of_the_model():
    lines = invoke("--predict", "H100").output.splitlines()
    first = prediction.predict_training(prediction.CARDS["H100"])[0]
    (line,) = (line for line in lines if prediction.label(first.shape) + " " in line)
    cells = re.split(" {2,}", line.strip())
    total = sum(first.concatenation)
    times = [prediction.microseconds(seconds) for seconds in (first.forward, first.backward, total)]
    assert cells == [prediction.label(first.shape), first.path, *times, f"{first.ratio:.2f}×"]


def test_list_names_the_cards():
    result = invoke("--predict", "list")
    assert result.exit_code == 0 and result.output.split() == list(prediction.CARDS)


def test_an_unknown_card_is_one_line_with_the_known_ones():
    result = invoke("--predict", "V100")
    assert result.exit_code == 2
    line = " ".join(result.stderr.split())
    assert "expected --predict to be one of A100, A10," in line and "got 'V100'; choose one, or list" in line
