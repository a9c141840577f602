"""One entry for every kind of data: a name, a file or ``pydoc`` becomes training pairs and held-out references."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

from prefix_fast.training.named import NAMED_DATA_SETS, load_named
from prefix_fast.training.pydoc import pydoc_examples
from prefix_fast.training.tables import TABLE_SUFFIXES, Example, group_references, read_table, spread_references

__all__ = ["Data", "Example", "data_folder", "load_data"]

_FILE_SPLIT_SEED = 0
_HELD_OUT_FRACTION = 20


@dataclass(frozen=True)
class Data:
    """Training pairs (one target each) and held-out examples (all references of a source together)."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    def split(self, name: str) -> list[Example]:
        """The examples of ``"train"``, ``"validation"`` or ``"test"``; a missing or empty one raises."""
        if name not in ("train", "validation", "test"):
            raise ValueError(f"Data.split: expected 'train', 'validation' or 'test', got {name!r}; choose one of them")
        examples: list[Example] = getattr(self, name)
        if not examples:
            raise ValueError(f"Data.split: expected examples in split {name!r} of {self.name}, got none; use another")
        return examples


def data_folder(data_dir: str | Path | None = None) -> Path | None:
    """The folder of local data sets: the argument, else ``PREFIX_FAST_DATA``, else None; it must exist."""
    chosen = data_dir or os.environ.get("PREFIX_FAST_DATA")
    if not chosen:
        return None
    if not Path(chosen).is_dir():
        raise ValueError(f"load_data: expected a folder of data sets, got {str(chosen)!r}; check the path")
    return Path(chosen)


def load_data(
    name: str,
    *,
    data_dir: str | Path | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
) -> Data:
    """Load ``e2e | webnlg | dart | xsum | scitldr | pydoc`` or a ``.csv`` / ``.jsonl`` file.

    Named sets come with their own splits. Of a file, one source in twenty (chosen with a fixed seed, at least one if
    there are two) is held out as validation *and* test; with all its rows, so no held-out source is trained on.

    Args:
        name: a name or a path.
        data_dir: where local copies of the named sets lie; by default ``PREFIX_FAST_DATA``.
        source_column: column of the inputs of a file, by default ``source``.
        target_column: column of the outputs of a file, by default ``target``.

    Raises:
        ValueError: an unknown name, a folder or file that is missing or empty, unknown columns, malformed lines.
    """
    is_file = name not in NAMED_DATA_SETS and name != "pydoc"
    if not is_file and (source_column or target_column):
        raise ValueError(
            f"load_data: expected no column names with the data set {name!r}, whose columns are known, got "
            f"{source_column or target_column!r}; leave out --source-column and --target-column"
        )
    if not is_file:
        splits = pydoc_examples() if name == "pydoc" else load_named(name, data_folder(data_dir))
        return Data(
            name,
            spread_references(splits["train"]),
            group_references(splits["validation"]),
            group_references(splits["test"]),
        )
    if Path(name).suffix.lower() not in TABLE_SUFFIXES:
        known = ", ".join((*NAMED_DATA_SETS, "pydoc"))
        raise ValueError(f"load_data: expected {known}, or a .csv or .jsonl file, got {name!r}; correct the name")
    return _hold_out(Path(name), read_table(name, source_column or "source", target_column or "target"))


def _hold_out(path: Path, examples: list[Example]) -> Data:
    grouped = group_references(examples)
    count = len(grouped) // _HELD_OUT_FRACTION or (1 if len(grouped) > 1 else 0)
    chosen = set(random.Random(_FILE_SPLIT_SEED).sample(range(len(grouped)), count))
    held_out = [example for index, example in enumerate(grouped) if index in chosen]
    train = [example for index, example in enumerate(grouped) if index not in chosen]
    return Data(path.name, spread_references(train), held_out, held_out)
