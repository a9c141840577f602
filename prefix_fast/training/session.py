"""Whole runs out of settings alone: start, resume, evaluate. What the command line and the demo call."""

import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefix_fast import dispatch
from prefix_fast.models.families import position_limit
from prefix_fast.patching import patch
from prefix_fast.prefix import Prefix, PrefixConfig
from prefix_fast.training.collate import RowFormat, RowTokenizer
from prefix_fast.training.data import Data, Example, load_data
from prefix_fast.training.decoding import generate_texts
from prefix_fast.training.loop import LoopSettings, Trainer
from prefix_fast.training.metrics import text_metrics
from prefix_fast.training.models import LanguageModel, load_language_model
from prefix_fast.training.run_folder import RunFolder, write_atomically
from prefix_fast.training.tables import TABLE_SUFFIXES, group_references, read_table

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_NUM_VIRTUAL_TOKENS = 10


@dataclass(frozen=True)
class RunSettings:
    """Everything a run depends on besides the code; written to ``run.json``.

    ``steps`` None: as many as ``epochs`` need. ``num_virtual_tokens`` None: the tokens of ``init_text``, or 10.
    ``compute_dtype`` is that of the frozen model; the prefix and its optimiser are float32 in any case.
    ``train_examples`` and ``eval_examples`` cap the two sets; 0: no cap.
    """

    model: str
    dataset: str
    source_column: str | None = None
    target_column: str | None = None
    data_dir: str | None = None
    num_virtual_tokens: int | None = None
    prefix_projection: bool = True
    encoder_hidden_size: int = 512
    init_text: str | None = None
    separator: str = "\n"
    max_source_tokens: int = 256
    max_target_tokens: int = 64
    train_examples: int = 0
    eval_examples: int = 200
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    bucket: int = 16
    eval_every: int = 0
    save_every: int = 100
    compute_dtype: str = "float32"
    device: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check what the parts they are handed to do not."""
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"train: expected compute_dtype to be one of {', '.join(COMPUTE_DTYPES)}, got {self.compute_dtype!r}; "
                "choose one of them"
            )
        if self.steps is None and not self.epochs > 0:
            raise ValueError(f"train: expected epochs > 0, got {self.epochs}; raise it or pass --steps")
        if self.num_virtual_tokens is not None and self.num_virtual_tokens < 1:
            raise ValueError(f"train: expected num_virtual_tokens >= 1, got {self.num_virtual_tokens}; raise it")
        for name in ("train_examples", "eval_examples"):
            if getattr(self, name) < 0:
                raise ValueError(f"train: expected {name} >= 0, got {getattr(self, name)}; 0 takes all")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunSettings":
        """Read the settings of ``run.json``; names that this version does not know raise."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown or not {"model", "dataset"} <= set(values):
            raise ValueError(
                f"train: expected the settings of this version in run.json, got {unknown or 'too few'}; "
                "start the run again with --overwrite"
            )
        return cls(**values)

    @property
    def row_format(self) -> RowFormat:
        """How texts become rows."""
        return RowFormat(self.separator, self.max_source_tokens, self.max_target_tokens)

    def loop_settings(self, num_rows: int) -> LoopSettings:
        """The optimisation, with epochs turned into steps."""
        rows_per_step = max(self.batch_size * self.gradient_accumulation, 1)
        steps = self.steps if self.steps is not None else max(1, round(self.epochs * num_rows / rows_per_step))
        shared = {f.name: getattr(self, f.name) for f in fields(LoopSettings) if f.name != "steps"}
        return LoopSettings(steps=steps, **shared)


def choose_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train: expected a device such as cpu or cuda, got {name!r}; correct it") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train: expected a device of this machine, got {name!r}, but torch sees no GPU; use cpu")
    return device


def versions() -> dict[str, str]:
    """The versions that a run's numbers may depend on."""
    packages = ("prefix-fast", "torch", "transformers")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


class Run(NamedTuple):
    """A run that is ready to train."""

    trainer: Trainer
    language_model: LanguageModel
    rows: RowTokenizer
    data: Data
    folder: RunFolder
    settings: RunSettings


def start_run(settings: RunSettings, output: str | Path, *, overwrite: bool = False, say: Callable[[str], None]) -> Run:
    """Load data and model, make the prefix, and claim the output folder; nothing is written if anything fails."""

    def claim() -> RunFolder:
        return RunFolder.create(output, asdict(settings), versions(), overwrite=overwrite)

    RunFolder.check_free(output, overwrite=overwrite)
    return _prepare(settings, say, claim)


def resume_run(output: str | Path, *, say: Callable[[str], None]) -> Run:
    """Rebuild the run of that folder and go back to its last checkpoint."""
    folder = RunFolder.open(output)
    run = _prepare(RunSettings.from_json(folder.settings), say, lambda: folder)
    run.trainer.resume()
    return run


def _prepare(settings: RunSettings, say: Callable[[str], None], make_folder: Callable[[], RunFolder]) -> Run:
    device = choose_device(settings.device)
    say(f"Reading the data set {settings.dataset}")
    data = _load(settings)
    train = data.split("train")[: settings.train_examples or None]
    held_out = data.validation[: settings.eval_examples or None]
    loop = settings.loop_settings(len(train))
    say(f"Loading the model {settings.model}")
    language_model = load_language_model(settings.model, dtype=COMPUTE_DTYPES[settings.compute_dtype], device=device)
    model, tokenizer = language_model
    rows = RowTokenizer(tokenizer, settings.row_format)
    prefix = make_prefix(settings, language_model)
    dispatch.choose(settings.backend, device.type, model.dtype, prefix.geometry.head_dim, ())
    patch(model, prefix, backend=settings.backend)
    train_rows, eval_rows = rows.rows(train), rows.rows(held_out)
    _check_positions(model, prefix, max(map(len, train_rows + eval_rows)))
    say(f"{len(train)} training rows, {len(held_out)} held out; {_describe(prefix)}")
    trainer = Trainer(
        model,
        train_rows,
        make_folder(),
        loop,
        pad_token_id=tokenizer.pad_token_id,
        save_prefix=model.prefix.save_pretrained,
        eval_rows=eval_rows,
    )
    return Run(trainer, language_model, rows, data, trainer.folder, settings)


def _check_positions(model: Any, prefix: Prefix, longest: int) -> None:
    """Refuse rows that cannot fit before a run is begun, not in the middle of it."""
    limit = position_limit(model)
    if limit is not None and prefix.num_virtual_tokens + longest > limit:
        raise ValueError(
            f"train: expected prefix and row to fit the model's {limit} positions, got {prefix.num_virtual_tokens} + "
            f"{longest}; lower --max-source-tokens, --max-target-tokens or --num-virtual-tokens"
        )


def _load(settings: RunSettings) -> Data:
    return load_data(
        settings.dataset,
        data_dir=settings.data_dir,
        source_column=settings.source_column,
        target_column=settings.target_column,
    )


def _describe(prefix: Prefix) -> str:
    count = sum(parameter.numel() for parameter in prefix.parameters())
    return f"a prefix of {prefix.num_virtual_tokens} tokens, {count:,} parameters"


def make_prefix(settings: RunSettings, language_model: LanguageModel) -> Prefix:
    """The prefix at the start of a run: random (by the seed), or the model's keys and values for ``init_text``."""
    model, tokenizer = language_model
    torch.manual_seed(settings.seed)
    length = settings.num_virtual_tokens
    if settings.init_text is not None and length is None:
        length = len(tokenizer(settings.init_text)["input_ids"])
    config = PrefixConfig(
        num_virtual_tokens=DEFAULT_NUM_VIRTUAL_TOKENS if length is None else length,
        prefix_projection=settings.prefix_projection,
        encoder_hidden_size=settings.encoder_hidden_size,
    )
    if settings.init_text is not None:
        prefix = Prefix.from_text(model, tokenizer, settings.init_text, config)
    else:
        prefix = Prefix(config, model.config, base_model_name=settings.model)
    return prefix.to(model.device)


class Trained(NamedTuple):
    """A finished run, patched and ready to generate."""

    language_model: LanguageModel
    rows: RowTokenizer
    settings: RunSettings
    folder: RunFolder


def load_trained(run: str | Path, *, device: str | None = None, backend: str | None = None) -> Trained:
    """Load a run's model with its trained prefix."""
    folder = RunFolder.open(run)
    settings = RunSettings.from_json(folder.settings)
    if not folder.prefix.is_dir():
        raise ValueError(f"load_trained: expected a trained prefix in {folder.prefix}, got none; train the run first")
    language_model = load_language_model(
        settings.model, dtype=COMPUTE_DTYPES[settings.compute_dtype], device=choose_device(device or settings.device)
    )
    prefix = Prefix.from_pretrained(folder.prefix, model_config=language_model.model.config)
    patch(language_model.model, prefix.to(language_model.model.device), backend=backend or settings.backend)
    return Trained(language_model, RowTokenizer(language_model.tokenizer, settings.row_format), settings, folder)


def examples_of(
    settings: RunSettings, split: str, limit: int, *, dataset: str | None = None, data_dir: str | None = None
) -> list[Example]:
    """Examples of a split of the run's data set or another named one; of a file (with the run's columns) all rows."""
    if limit < 0:
        raise ValueError(f"eval: expected --examples >= 0, got {limit}; 0 takes all")
    columns = (settings.source_column or "source", settings.target_column or "target")
    if dataset is None:
        examples = _load(settings).split(split)
    elif Path(dataset).suffix.lower() in TABLE_SUFFIXES:
        examples = group_references(read_table(dataset, *columns))
    else:
        examples = load_data(dataset, data_dir=data_dir or settings.data_dir).split(split)
    return examples[: limit or None]


def evaluate_run(
    trained: Trained,
    examples: list[Example],
    *,
    batch_size: int,
    num_beams: int,
    max_new_tokens: int,
    on_batch: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """Generate for every example, score, and write ``evaluation.json`` and ``predictions.jsonl`` to the folder."""
    predictions = generate_texts(
        trained.language_model.model,
        trained.rows,
        [example.source for example in examples],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        num_beams=num_beams,
        on_batch=on_batch,
    )
    scores = text_metrics(predictions, [example.targets for example in examples])
    lines = [
        {"source": example.source, "prediction": prediction, "references": list(example.targets)}
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    report = {"scores": scores, "examples": len(examples), "num_beams": num_beams, "max_new_tokens": max_new_tokens}
    write_atomically(trained.folder.path / "evaluation.json", (json.dumps(report, indent=2) + "\n").encode())
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(trained.folder.path / "predictions.jsonl", text.encode())
    return scores
