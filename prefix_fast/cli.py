"""The command ``prefix-fast``: train, evaluate and use prefixes, and see what runs on this machine."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table
except ModuleNotFoundError as missing:
    sys.stderr.write(
        f"prefix-fast: expected the package {missing.name}, which is not installed; "
        "run pip install 'prefix-fast[train]'\n"
    )
    raise SystemExit(2) from missing

app = typer.Typer(
    help="Fast prefix tuning of causal language models.", no_args_is_help=True, pretty_exceptions_enable=False
)
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_Run = Annotated[Path, typer.Option("--run", help="Folder of a training run.")]
_Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default that of the run.")]
_Backend = Annotated[str | None, typer.Option(help="Backend of the attention; by default that of the run.")]
_BatchSize = Annotated[int, typer.Option(min=1, help="Rows generated at a time.")]
_Beams = Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy.")]
_NewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer; by default the run's target limit.")]
_Split = Annotated[str, typer.Option(help="train, validation or test.")]
_data, _prefix, _optimisation = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Data", "Prefix", "Optimisation")
)


@app.command()
def train(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder of the run: settings, metrics, prefix, loss curve.")],
    model: Annotated[str, typer.Option(help="smollm2-135m, a folder, or a hub name.")] = "",
    dataset: Annotated[str, typer.Option(help="e2e, webnlg, dart, xsum, scitldr, pydoc, or a .csv/.jsonl file.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output with its settings.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")] = False,
    source_column: Annotated[str | None, _data(help="Of a file; by default source.")] = None,
    target_column: Annotated[str | None, _data(help="Of a file; by default target.")] = None,
    data_dir: Annotated[str | None, _data(help="Local data sets; by default PREFIX_FAST_DATA.")] = None,
    separator: Annotated[str, _data(help="Between source and target: a line break.", show_default=False)] = "\n",
    max_source_tokens: Annotated[int, _data(help="Longer sources lose their end.")] = 256,
    max_target_tokens: Annotated[int, _data(help="Longer targets lose their end.")] = 64,
    train_examples: Annotated[int, _data(help="Cap on training rows; 0: none.")] = 0,
    eval_examples: Annotated[int, _data(help="Cap on held-out rows; 0: none.")] = 200,
    num_virtual_tokens: Annotated[int | None, _prefix(help="Length; by default that of --init-text, or 10.")] = None,
    prefix_projection: Annotated[bool, _prefix(help="Learn through an MLP, not keys and values directly.")] = True,
    encoder_hidden_size: Annotated[int, _prefix(help="Width of the MLP.")] = 512,
    init_text: Annotated[str | None, _prefix(help="Start as the model's keys and values of a text.")] = None,
    epochs: Annotated[float, _optimisation(help="Passes over the data.")] = 3.0,
    steps: Annotated[int | None, _optimisation(help="Optimiser steps, instead of --epochs.")] = None,
    batch_size: Annotated[int, _optimisation(help="Rows in a batch.")] = 8,
    gradient_accumulation: Annotated[int, _optimisation(help="Batches in a step.")] = 1,
    learning_rate: Annotated[float, _optimisation(help="Of AdamW, at its highest.")] = 1e-3,
    warmup_steps: Annotated[int, _optimisation(help="Steps up to the highest learning rate.")] = 0,
    schedule: Annotated[str, _optimisation(help="linear, cosine, constant_with_warmup, ...")] = "linear",
    weight_decay: Annotated[float, _optimisation(help="Of AdamW.")] = 0.0,
    max_grad_norm: Annotated[float, _optimisation(help="Larger gradients are scaled down to it.")] = 1.0,
    seed: Annotated[int, _optimisation(help="Of the prefix, the order of the data and dropout.")] = 0,
    bucket: Annotated[int, _optimisation(help="Sort that many batches' rows by length; 0: no.")] = 16,
    eval_every: Annotated[int, _optimisation(help="Steps between held-out losses; 0: at the end.")] = 0,
    save_every: Annotated[int, _optimisation(help="Steps between checkpoints; 0: at the end.")] = 100,
    compute_dtype: Annotated[str, _optimisation(help="float32 or bfloat16, of the frozen model.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[str, typer.Option(help="Backend of the attention.")] = "auto",
    debug: _Debug = False,
) -> None:
    """Train a prefix for a frozen language model."""
    with _one_line_errors(debug):
        from prefix_fast.training.session import RunSettings, resume_run, start_run

        console = Console()
        say = partial(console.print, markup=False, highlight=False)
        given = {field.name: ctx.params[field.name] for field in fields(RunSettings)}
        if resume:
            _refuse_changes(ctx, output, given)
            run = resume_run(output, say=say)
        elif model and dataset:
            run = start_run(RunSettings(**given), output, overwrite=overwrite, say=say)
        else:
            raise ValueError("train: expected --model and --dataset, got only one or none; name both, or --resume")
        _train(run.trainer, console, output)


def _train(trainer: Any, console: Console, output: Path) -> None:
    """Run the trainer under a progress bar; exit with INTERRUPTED after Ctrl-C."""
    from prefix_fast.training.progress import TrainingProgress

    resume_line = f"[bold]prefix-fast train --resume --output {escape(str(output))}[/]"
    try:
        with TrainingProgress(console, trainer.settings.steps, trainer.step) as progress:
            trainer.on_record = progress.update
            result = trainer.run()
    except KeyboardInterrupt:
        console.print(f"Stopped in the middle of a step. Continue from the last checkpoint: {resume_line}")
        raise typer.Exit(INTERRUPTED) from None
    if result.interrupted:
        console.print(f"Stopped after step {result.step} and saved. Continue with: {resume_line}")
        raise typer.Exit(INTERRUPTED)
    where = escape(str(output))
    console.print(f"Done. Prefix: {where}/prefix, loss curve: {where}/loss.png", soft_wrap=True)


@app.command("eval")
def evaluate(
    run: _Run,
    split: _Split = "test",
    dataset: Annotated[str | None, typer.Option(help="Another data set or file than the run's.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Local data sets; by default that of the run.")] = None,
    examples: Annotated[int, typer.Option(help="How many; 0: all.")] = 0,
    batch_size: _BatchSize = 16,
    num_beams: _Beams = 1,
    max_new_tokens: _NewTokens = None,
    device: _Device = None,
    backend: _Backend = None,
    debug: _Debug = False,
) -> None:
    """Generate for held-out examples and score: BLEU, chrF, ROUGE against all references."""
    with _one_line_errors(debug):
        from prefix_fast.training.session import evaluate_run, examples_of, load_trained

        console = Console()
        trained = load_trained(run, device=device, backend=backend)
        chosen = examples_of(trained.settings, split, examples, dataset=dataset, data_dir=data_dir)
        with console.status(f"Generating for {len(chosen)} examples") as status:
            scores = evaluate_run(
                trained,
                chosen,
                batch_size=batch_size,
                num_beams=num_beams,
                max_new_tokens=max_new_tokens or trained.settings.max_target_tokens,
                on_batch=lambda count: status.update(f"Generated {count} of {len(chosen)}"),
            )
        table = Table("metric", "score", title=f"{len(chosen)} examples")
        for name, score in scores.items():
            table.add_row(name, f"{score:.2f}")
        console.print(table)


@app.command()
def generate(
    run: _Run,
    text: Annotated[list[str] | None, typer.Argument(help="Source texts; none: held-out examples.")] = None,
    split: _Split = "test",
    examples: Annotated[int, typer.Option(min=1, help="How many held-out examples.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    batch_size: _BatchSize = 16,
    num_beams: _Beams = 1,
    max_new_tokens: _NewTokens = None,
    device: _Device = None,
    backend: _Backend = None,
    debug: _Debug = False,
) -> None:
    """Answer source texts with a trained prefix."""
    with _one_line_errors(debug):
        from prefix_fast.training.decoding import generate_texts
        from prefix_fast.training.session import examples_of, load_trained

        trained = load_trained(run, device=device, backend=backend)
        held_out = [] if text else examples_of(trained.settings, split, examples)
        sources = text or [example.source for example in held_out]
        answers = generate_texts(
            trained.language_model.model,
            trained.rows,
            sources,
            max_new_tokens=max_new_tokens or trained.settings.max_target_tokens,
            batch_size=batch_size,
            num_beams=num_beams,
        )
        console = Console(highlight=False, soft_wrap=True)
        for index, (source, answer) in enumerate(zip(sources, answers, strict=True)):
            if as_json:
                typer.echo(json.dumps({"source": source, "answer": answer}, ensure_ascii=False))
                continue
            console.print(f"[dim]{escape(source)}[/]\n[bold]→ {escape(answer)}[/]")
            if held_out:
                console.print(f"[dim]reference: {escape(held_out[index].targets[0])}[/]")
            console.print()


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A folder, a Hub id, or a file of the original code's weights.")],
    output: Annotated[Path, typer.Argument(help="Folder for the result.")],
    to: Annotated[str, typer.Option(help="peft, native or original.")] = "peft",
    model: Annotated[str, typer.Option(help="Folder or hub name of the model that the prefix is for.")] = "",
    debug: _Debug = False,
) -> None:
    """Write a prefix in another format; reads PEFT's, ours, those of adapters and of the original code."""
    with _one_line_errors(debug):
        from transformers import AutoConfig

        from prefix_fast import conversion

        prefix = conversion.convert(source, output, to, AutoConfig.from_pretrained(model) if model else None)
        Console(highlight=False).print(f"{prefix.num_virtual_tokens} virtual tokens in {escape(str(output))}")


@app.command()
def doctor(
    recheck: Annotated[bool, typer.Option("--recheck", help="Check Triton's tiles and time linears again.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Check every one, not only head dims 64 and 128.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Time other tiles too; keep the fastest right ones.")] = False,
    debug: _Debug = False,
) -> None:
    """Show the backends, why each is or is not used, and check each against the oracle on this device."""
    with _one_line_errors(debug):
        from prefix_fast.doctor_report import report

        if not report(Console(highlight=False), every, recheck, tune):
            raise typer.Exit(FAILED)


@app.command("build-cuda")
def build_cuda(archs: Annotated[str, typer.Option(help="As 80,90; by default those of this machine.")] = "") -> None:
    """Compile the CUDA kernels of a checkout into its installation; needs nvcc, no card."""
    with _one_line_errors(False):
        from prefix_fast import cuda_build

        cuda_build.install(archs)


@app.command()
def bench(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str, typer.Option(help="Backend of the attention.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each side, in turns; the median counts.")] = 10,
    predict: Annotated[str, typer.Option(help="Time nothing: predict for a card, as H100; list shows them.")] = "",
    debug: _Debug = False,
) -> None:
    """Time the operator, forward and backward, against concatenation and PyTorch's SDPA."""
    with _one_line_errors(debug):
        if predict:
            _print_predictions(predict)
            return
        import torch

        from prefix_fast.speed import measure

        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in dtypes:
            raise ValueError(f"bench: expected --dtype to be one of {', '.join(dtypes)}, got {dtype!r}; choose one")
        console = Console(highlight=False)
        table = Table(Column("shape", no_wrap=True), "ours", "concatenation + SDPA", "ratio", "largest difference")
        table.title = f"forward + backward, {dtype} on {device}, {torch.get_num_threads()} threads"
        with console.status("Measuring"):
            for m in measure(dtype=dtypes[dtype], device=device, backend=backend, repeats=repeats):
                times = (f"{1e3 * m.ours:.1f} ms", f"{1e3 * m.rival:.1f} ms")
                table.add_row(str(m.shape), *times, f"{m.ratio:.2f}×", f"{m.difference:.1e}")
        console.print(table)


def _print_predictions(name: str) -> None:
    """The tables of `bench --predict`; of the known cards for the name list."""
    from prefix_fast import prediction

    console = Console(highlight=False)
    if name.lower() == "list":
        console.print("\n".join(prediction.CARDS))
        return
    known, card = prediction.card_named(name)
    console.print(f"[bold]Prediction from a roofline for {known}, never measured.[/] {prediction.ASSUMPTIONS}")
    table = _predictions_table(f"training: {known}, predicted µs in bfloat16", "prefix", "backward", "SDPA", "ratio")
    for p in prediction.predict_training(card):
        times = (prediction.microseconds(t) for t in (p.forward, p.backward, sum(p.concatenation)))
        table.add_row(prediction.label(p.shape), p.path, *times, f"{p.ratio:.2f}×")
    console.print(table)
    table = _predictions_table(
        f"decoding: {known}, predicted µs in bfloat16", "chunks", "SDPA", "ratio", "cached", "ratio"
    )
    for d in prediction.predict_decoding(card):
        rivals = (sum(d.concatenation), d.cached)
        of_rivals = [text for t in rivals for text in (prediction.microseconds(t), f"{t / d.forward:.1f}×")]
        table.add_row(prediction.label(d.shape), d.path, prediction.microseconds(d.forward), *of_rivals)
    console.print(table)
    console.print("SDPA: over the concatenation, copies included; cached: over a cache that was concatenated before.")


def _predictions_table(title: str, path: str, *more: str) -> Any:
    """A table that fits 80 columns."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("shape", no_wrap=True)
    for column in (path, "forward", *more):
        table.add_column(column, justify="right")
    return table


def _refuse_changes(ctx: typer.Context, output: Path, given: dict[str, Any]) -> None:
    """A resumed run has its own settings: an option that says otherwise is an error, not ignored."""
    from prefix_fast.training.run_folder import RunFolder

    stored = RunFolder.open(output).settings
    changed = []
    for name, value in given.items():
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and stored.get(name) != value:
            changed.append(f"--{name.replace('_', '-')} {value} (the run has {stored.get(name)})")
    if changed:
        raise ValueError(
            f"train: expected the run's own settings with --resume, got {', '.join(changed)}; "
            "leave them out, or start another run"
        )


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Turn what users can cause into one line and exit code 2; anything else is a defect and keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ArithmeticError, OSError, ImportError) as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from error


def main() -> None:
    """Entry point of the command ``prefix-fast``."""
    app()


if __name__ == "__main__":
    main()
