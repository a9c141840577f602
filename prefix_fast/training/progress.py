"""Show a training run: a bar with loss, tokens a second and time left, or lines where there is no terminal."""

from collections import deque
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_WINDOW = 20
_LINES_WITHOUT_TERMINAL = 10


class TrainingProgress:
    """A context manager whose :meth:`update` takes the records of a ``Trainer``."""

    def __init__(self, console: Console, total_steps: int, first_step: int = 0, label: str = "training") -> None:
        """Prepare the bar; it appears on entering."""
        self.console = console
        self.total_steps = total_steps
        self.label = label
        self._recent: deque[dict[str, Any]] = deque(maxlen=_WINDOW)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(label, total=total_steps, completed=first_step, figures="")

    def __enter__(self) -> "TrainingProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, record: dict[str, Any]) -> None:
        """Show one record."""
        if "eval_loss" in record:
            self.eval_loss = record["eval_loss"]
            self.console.print(
                f"step {record['step']}: loss on held-out rows {record['eval_loss']:.4f}", highlight=False
            )
            return
        self._recent.append(record)
        figures = self._figures()
        self._progress.update(self._task, completed=record["step"], figures=figures)
        every = max(1, self.total_steps // _LINES_WITHOUT_TERMINAL)
        if not self.console.is_terminal and record["step"] % every == 0:
            self.console.print(f"{self.label} {record['step']}/{self.total_steps} {figures}", highlight=False)

    def _figures(self) -> str:
        loss = sum(record["loss"] for record in self._recent) / len(self._recent)
        seconds = sum(record["seconds"] for record in self._recent)
        tokens = sum(record["tokens"] for record in self._recent)
        return f"loss {loss:.4f} · {tokens / seconds:,.0f} tokens/s"
