"""The data sets known by name: from a local folder where there is one, else from the hub through ``datasets``.

Local folders, below ``--data-dir`` or ``PREFIX_FAST_DATA``:

| name | files |
|---|---|
| e2e | ``e2e_nlg/{trainset,devset,testset_w_refs}.csv``, columns mr, ref |
| scitldr | ``scitldr/{train,dev,test}.jsonl``, columns source, target |
| webnlg, dart, xsum | ``NAME/{train,validation,test}.{jsonl,csv}``, columns source, target |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefix_fast.training.extras import require
from prefix_fast.training.hub import hub_is_reachable
from prefix_fast.training.tables import Example, read_table, rows_to_examples

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class NamedDataSet:
    """Where a data set lies on the hub and in a local folder, and which columns hold the texts."""

    folder: str
    local_files: Mapping[str, tuple[str, ...]]
    local_columns: tuple[str, str]
    hub_id: str
    hub_config: str
    hub_columns: tuple[str, str]
    hub_references: str | None = None


_ANY_TABLE = {split: (f"{split}.jsonl", f"{split}.csv") for split in SPLITS}
NAMED_DATA_SETS = {
    "e2e": NamedDataSet(
        folder="e2e_nlg",
        local_files={"train": ("trainset.csv",), "validation": ("devset.csv",), "test": ("testset_w_refs.csv",)},
        local_columns=("mr", "ref"),
        hub_id="GEM/e2e_nlg",
        hub_config="default",
        hub_columns=("meaning_representation", "target"),
        hub_references="references",
    ),
    "webnlg": NamedDataSet(
        folder="webnlg",
        local_files=_ANY_TABLE,
        local_columns=("source", "target"),
        hub_id="GEM/web_nlg",
        hub_config="en",
        hub_columns=("input", "target"),
        hub_references="references",
    ),
    "dart": NamedDataSet(
        folder="dart",
        local_files=_ANY_TABLE,
        local_columns=("source", "target"),
        hub_id="GEM/dart",
        hub_config="default",
        hub_columns=("tripleset", "target"),
        hub_references="references",
    ),
    "xsum": NamedDataSet(
        folder="xsum",
        local_files=_ANY_TABLE,
        local_columns=("source", "target"),
        hub_id="EdinburghNLP/xsum",
        hub_config="default",
        hub_columns=("document", "summary"),
    ),
    "scitldr": NamedDataSet(
        folder="scitldr",
        local_files={"train": ("train.jsonl",), "validation": ("dev.jsonl",), "test": ("test.jsonl",)},
        local_columns=("source", "target"),
        hub_id="allenai/scitldr",
        hub_config="Abstract",
        hub_columns=("source", "target"),
    ),
}


def load_named(name: str, data_dir: str | Path | None) -> dict[str, list[Example]]:
    """Return the splits of a named data set, from ``data_dir`` if it holds it, else from the hub."""
    entry = NAMED_DATA_SETS[name]
    folder = Path(data_dir) / entry.folder if data_dir else None
    if folder is not None and folder.is_dir():
        return _load_local(name, entry, folder)
    if not hub_is_reachable():
        looked = f"no folder {folder}" if folder else "no data folder was given"
        raise ValueError(
            f"load_data: expected the data set {name!r} in a local folder or on the hub, got neither "
            f"({looked}, no connection to the hub); set --data-dir or PREFIX_FAST_DATA to a folder with {entry.folder}/"
        )
    return _load_hub(name, entry)


def _load_local(name: str, entry: NamedDataSet, folder: Path) -> dict[str, list[Example]]:
    splits = {}
    for split, candidates in entry.local_files.items():
        files = [folder / file for file in candidates if (folder / file).is_file()]
        if not files:
            raise ValueError(
                f"load_data: expected {' or '.join(candidates)} in {folder} for the data set {name!r}, "
                f"got {sorted(p.name for p in folder.iterdir())}; rename or add the file"
            )
        splits[split] = read_table(files[0], *entry.local_columns)
    return splits


def _load_hub(name: str, entry: NamedDataSet) -> dict[str, list[Example]]:
    """Read the parquet files that the hub keeps for every data set (script-based ones included)."""
    datasets = require("datasets", "load_data")
    try:
        loaded = datasets.load_dataset(entry.hub_id, data_dir=entry.hub_config, revision="refs/convert/parquet")
    except Exception as error:  # the library raises a dozen unrelated types for what is missing or unreachable
        raise ValueError(
            f"load_data: expected the data set {name!r} at {entry.hub_id} on the hub, got {type(error).__name__} "
            f"({str(error).splitlines()[0] if str(error) else 'no message'}); "
            "try again, or pass --data-dir with a local copy"
        ) from error
    source_column, target_column = entry.hub_columns
    splits = {}
    for split in SPLITS:
        rows = []
        for number, row in enumerate(loaded[split], start=1):
            references = row.get(entry.hub_references) if entry.hub_references and split != "train" else None
            fields = {source_column: linearise(row[source_column]), target_column: references or row[target_column]}
            rows.append((number, fields))
        splits[split] = rows_to_examples(rows, source_column, target_column, origin=f"{entry.hub_id} ({split})")
    return splits


def linearise(field: Any) -> Any:
    """Write (subject, relation, object) triples as ``subject | relation | object``; leave texts as they are."""
    if isinstance(field, (list, tuple)):
        return [" | ".join(item) if isinstance(item, (list, tuple)) else item for item in field]
    return field
