"""The folder of one training run: settings, metrics, prefix, loss curve and what a resumed run needs.

    run.json             the settings and the versions of what ran
    metrics.jsonl        one object a step (loss, learning rate, tokens, seconds) and a evaluation (eval_loss)
    prefix/              the prefix in PEFT's file format
    training_state.pt    parameters, optimiser, schedule and random state; read with weights_only
    loss.png             the loss curve

Files are written beside their place and renamed, so a reader or a crash never meets half of one.
"""

import io
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prefix_fast.training.extras import require

RUN_FILE = "run.json"
_OWN_NAMES = (
    *(RUN_FILE, "metrics.jsonl", "training_state.pt", "loss.png", "prefix"),
    *("evaluation.json", "predictions.jsonl"),
)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file in one step: it holds its old content or the new one, never a part."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _is_own(name: str) -> bool:
    """Whether a run writes a file or folder of this name, or leaves one when it is killed while writing."""
    return any(name == own or name.startswith(f".{own}-") for own in _OWN_NAMES)


class RunFolder:
    """Read and write the files of one run; make one with :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Use :meth:`create` or :meth:`open`, which check the folder."""
        self.path = path
        self.settings = settings

    @classmethod
    def create(
        cls, path: str | Path, settings: Mapping[str, Any], versions: Mapping[str, str], *, overwrite: bool = False
    ) -> "RunFolder":
        """Start a run in a new or empty folder; ``overwrite`` first deletes the files of the run it holds."""
        path = cls.check_free(path, overwrite=overwrite)
        if overwrite:
            cls._delete_run(path)
        path.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": dict(settings), "versions": dict(versions)}, indent=2) + "\n"
        write_atomically(path / RUN_FILE, content.encode())
        return cls(path, dict(settings))

    @staticmethod
    def check_free(path: str | Path, *, overwrite: bool = False) -> Path:
        """Raise where :meth:`create` would, before anything expensive is done; nothing is changed."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"RunFolder: expected a folder, got the file {path}; choose another --output")
        holds_run = (path / RUN_FILE).exists()
        if holds_run and not overwrite:
            raise ValueError(
                f"RunFolder: expected a new or empty folder, got {path}, which holds another run; "
                "continue it with --resume, replace it with --overwrite, or choose another --output"
            )
        found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        foreign = [name for name in found if not (holds_run and _is_own(name))]
        if foreign:
            raise ValueError(
                f"RunFolder: expected a new or empty folder, got {path}, which holds {', '.join(foreign[:3])}; "
                "choose another --output"
            )
        return path

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open the folder of an earlier run."""
        path = Path(path)
        if not (path / RUN_FILE).is_file():
            raise ValueError(f"RunFolder: expected the folder of a run, got {path}, which has no {RUN_FILE}; check it")
        try:
            content = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
            settings = dict(content["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"RunFolder: expected the settings of a run in {path / RUN_FILE}, got something else ({error}); "
                "start the run again with --overwrite"
            ) from error
        return cls(path, settings)

    @staticmethod
    def _delete_run(path: Path) -> None:
        for entry in path.iterdir() if path.is_dir() else ():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    @property
    def prefix(self) -> Path:
        """Where the prefix lies."""
        return self.path / "prefix"

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(record)) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of ``metrics.jsonl``; a last line cut short by a crash is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def cut_metrics(self, last_step: int) -> None:
        """Forget what was recorded after ``last_step``: a resumed run records it again."""
        kept = [record for record in self.read_metrics() if record["step"] <= last_step]
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept).encode())

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write ``training_state.pt``."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomically(self.path / "training_state.pt", buffer.getvalue())

    def load_state(self) -> dict[str, Any]:
        """Read ``training_state.pt``; only tensors and plain values are ever unpickled."""
        path = self.path / "training_state.pt"
        if not path.is_file():
            raise ValueError(
                f"RunFolder: expected {path.name} in {self.path}, got none: nothing was saved to resume from; "
                "start again with --overwrite"
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise ValueError(
                f"RunFolder: expected the state of a run in {path}, got a file that cannot be read "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); start again with --overwrite"
            ) from error
        if not isinstance(state, dict):
            raise ValueError(f"RunFolder: expected the state of a run in {path}, got a {type(state).__name__}")
        return state

    def plot_losses(self) -> None:
        """Draw ``loss.png`` from ``metrics.jsonl``: training loss, and evaluation loss where there is one."""
        figure = require("matplotlib.figure", "plot_losses").Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        records = self.read_metrics()
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(xlabel="step", ylabel="loss per target token", title=str(self.settings.get("model", "")))
        axes.grid(alpha=0.3)
        if records:
            axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        write_atomically(self.path / "loss.png", buffer.getvalue())
