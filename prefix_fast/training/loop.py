"""The training loop: AdamW on the parameters that require gradients, exact resume, one record a step.

A run is a pure function of its settings, rows and starting parameters: batch n is computed from (seed, n), and what
else the next step depends on (parameters, optimiser, schedule, random state) is in every checkpoint. On the CPU a
resumed run therefore equals an uninterrupted one bit for bit (with the same number of threads).
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefix_fast.training.collate import IGNORED_LABEL, BatchOrder, TokenRow, collate_training
from prefix_fast.training.run_folder import RunFolder

# Those of transformers' get_scheduler that need nothing but the two step counts.
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


@dataclass(frozen=True)
class LoopSettings:
    """How the prefix is optimised; ``steps`` are optimiser steps of ``gradient_accumulation`` batches each."""

    steps: int
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 5e-3
    warmup_steps: int = 0
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    bucket: int = 0
    eval_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        """Check every number."""
        for name in ("steps", "batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: expected {name} >= 1, got {getattr(self, name)}; raise it")
        for name in ("warmup_steps", "weight_decay", "bucket", "eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"train: expected {name} >= 0, got {getattr(self, name)}; 0 turns it off")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"train: expected schedule to be one of {', '.join(SCHEDULES)}, got {self.schedule!r}; choose one"
            )
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"train: expected {name} > 0 and finite, got {value}; correct it")


class StepStats(NamedTuple):
    """What one optimiser step measured; ``loss`` is the mean over its target tokens, before the update."""

    loss: float
    grad_norm: float
    tokens: int


class TrainResult(NamedTuple):
    """How a run ended: the last step done, and whether it was stopped before its end."""

    step: int
    interrupted: bool


def make_optimizer(parameters: Sequence[nn.Parameter], settings: LoopSettings) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and the learning rate's schedule."""
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return optimizer, get_scheduler(settings.schedule, optimizer, settings.warmup_steps, settings.steps)


def training_step(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
) -> StepStats:
    """Forward, backward and update over accumulated batches, each weighed by its number of target tokens."""
    counts = [int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()) for batch in batches]
    loss_sum = torch.zeros((), device=parameters[0].device)
    for batch, count in zip(batches, counts, strict=True):
        loss = model(**batch).loss * (count / sum(counts))
        loss.backward()
        loss_sum += loss.detach()
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    loss_value, norm_value = float(loss_sum), float(grad_norm)
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise ValueError(
            f"train: expected a finite loss and gradient, got loss {loss_value} and gradient norm {norm_value}; "
            "lower --learning-rate or resume from the last checkpoint"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepStats(loss_value, norm_value, sum(int(batch["attention_mask"].sum()) for batch in batches))


@torch.no_grad()
def evaluation_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """Mean loss per target token in eval mode; the mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        total, count = 0.0, 0
        for batch in batches:
            tokens = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
        return total / count
    finally:
        model.train(was_training)


class Trainer:
    """Train the parameters of ``model`` that require gradients on ``rows`` and keep everything in ``folder``.

    Args:
        model: a patched model (or any model whose call returns a loss).
        rows: training rows; their order is chosen by the seed.
        folder: where metrics and checkpoints go.
        settings: the optimisation.
        pad_token_id: fills the rows of a batch up to its longest.
        save_prefix: called with the folder for the prefix at each checkpoint.
        eval_rows: held-out rows, for the loss at every ``eval_every`` steps and at the end.

    The attribute ``on_record`` is called with each record as it is written to ``metrics.jsonl``.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[TokenRow],
        folder: RunFolder,
        settings: LoopSettings,
        *,
        pad_token_id: int,
        save_prefix: Callable[[Any], None],
        eval_rows: Sequence[TokenRow] = (),
    ) -> None:
        """Make the optimiser and schedule; nothing is written yet."""
        self.model = model
        self.rows = rows
        self.folder = folder
        self.settings = settings
        self.pad_token_id = pad_token_id
        self.save_prefix = save_prefix
        self.eval_rows = eval_rows
        self.on_record: Callable[[dict[str, Any]], None] = lambda record: None
        self.order = BatchOrder([len(row) for row in rows], settings.batch_size, settings.seed, settings.bucket)
        self.named_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named_parameters:
            raise ValueError("train: expected parameters that require gradients, got none; patch the model first")
        self.parameters = list(self.named_parameters.values())
        self.device = self.parameters[0].device
        self.optimizer, self.scheduler = make_optimizer(self.parameters, settings)
        self.step = 0

    def run(self) -> TrainResult:
        """Train up to ``settings.steps`` and save; after Ctrl-C, save at the end of the current step and return."""
        if self.step == 0:
            torch.manual_seed(self.settings.seed)
        self.model.train()
        with _interruptible() as interrupted:
            while self.step < self.settings.steps and not interrupted.is_set():
                self._record(self._one_step())
                if self._is_due(self.settings.eval_every) or self.step == self.settings.steps:
                    self._evaluate()
                if self._is_due(self.settings.save_every):
                    self.save()
            self.save()
        self.folder.plot_losses()
        return TrainResult(self.step, self.step < self.settings.steps)

    def _is_due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _one_step(self) -> dict[str, Any]:
        started = time.perf_counter()
        learning_rate = self.scheduler.get_last_lr()[0]
        stats = training_step(
            self.model, self.batches(self.step), self.parameters, self.optimizer, self.settings.max_grad_norm
        )
        self.scheduler.step()
        self.step += 1
        return {
            "step": self.step,
            "loss": stats.loss,
            "learning_rate": learning_rate,
            "grad_norm": stats.grad_norm,
            "tokens": stats.tokens,
            "seconds": time.perf_counter() - started,
        }

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """The batches of optimiser step ``step`` (from 0), on the parameters' device."""
        first = step * self.settings.gradient_accumulation
        numbers = range(first, first + self.settings.gradient_accumulation)
        return [self._collate([self.rows[index] for index in self.order[number]]) for number in numbers]

    def _collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        batch = collate_training(rows, self.pad_token_id)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _evaluate(self) -> None:
        if self.eval_rows:
            size = self.settings.batch_size
            chunks = [self.eval_rows[start : start + size] for start in range(0, len(self.eval_rows), size)]
            loss = evaluation_loss(self.model, (self._collate(chunk) for chunk in chunks))
            self._record({"step": self.step, "eval_loss": loss})

    def _record(self, record: dict[str, Any]) -> None:
        self.folder.append_metrics(record)
        self.on_record(record)

    def save(self) -> None:
        """Write the prefix and the state to resume from."""
        self.save_prefix(self.folder.prefix)
        self.folder.save_state(
            {
                "step": self.step,
                "parameters": {name: p.detach() for name, p in self.named_parameters.items()},
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "random_state": torch.get_rng_state(),
                "cuda_random_states": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            }
        )

    def resume(self) -> None:
        """Go on from the folder's checkpoint: the following steps are those of a run that never stopped."""
        state = self.folder.load_state()
        shapes = {name: tuple(p.shape) for name, p in self.named_parameters.items()}
        saved = {name: tuple(tensor.shape) for name, tensor in state.get("parameters", {}).items()}
        if saved != shapes:
            raise ValueError(
                f"train: expected the checkpoint in {self.folder.path} to hold {shapes}, got {saved}; "
                "resume with the run's own settings"
            )
        with torch.no_grad():
            for name, parameter in self.named_parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random_state"])
        if state["cuda_random_states"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_random_states"])
        self.step = state["step"]
        self.folder.cut_metrics(self.step)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C instead of raising in the middle of a step; a second one raises at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(signum: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
