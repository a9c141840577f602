"""Read source → target pairs out of csv and jsonl files, by column name."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

TABLE_SUFFIXES = (".csv", ".jsonl")


class Example(NamedTuple):
    """One source text with the targets that answer it: one for training, any number of references for evaluation."""

    source: str
    targets: tuple[str, ...]


def read_table(path: str | Path, source_column: str, target_column: str) -> list[Example]:
    """Read a ``.csv`` (with a header line) or ``.jsonl`` (an object a line) file, one example a row, in file order.

    A field may be a text or a list of texts: a list of sources is joined with spaces (sentences of a document), a
    list of targets gives that many targets. Rows with an empty source or target are left out.

    Raises:
        ValueError: no such file, another kind of file, an unknown column, a line that is not JSON, a field that is
            no text, or no example at all.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"read_table: expected a file, got {path}, which is none; check the path")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise ValueError(f"read_table: expected a .csv or .jsonl file, got {path.name}; convert it to one of them")
    rows = readers[path.suffix.lower()](path)
    return rows_to_examples(rows, source_column, target_column, origin=path.name)


def rows_to_examples(
    rows: Iterable[tuple[int, Mapping[str, Any]]], source_column: str, target_column: str, *, origin: str
) -> list[Example]:
    """Turn numbered rows into examples; the rules and errors of :func:`read_table`."""
    examples = []
    for number, row in rows:
        for column in (source_column, target_column):
            if column not in row:
                raise ValueError(
                    f"read_table: expected a column {column!r} in {origin}, line {number} has "
                    f"{sorted(map(str, row))}; name the columns with --source-column and --target-column"
                )
        where = f"{origin} line {number}"
        source = " ".join(_texts(row[source_column], source_column, where))
        targets = tuple(_texts(row[target_column], target_column, where))
        if source and targets:
            examples.append(Example(source, targets))
    if not examples:
        raise ValueError(
            f"read_table: expected at least one row with a source and a target in {origin}, got none; "
            "check that the file is not empty and that the columns are the right ones"
        )
    return examples


def group_references(examples: Iterable[Example]) -> list[Example]:
    """Put the targets of equal sources together, as references of one example, in the order of first appearance."""
    grouped: dict[str, dict[str, None]] = {}
    for example in examples:
        grouped.setdefault(example.source, {}).update(dict.fromkeys(example.targets))
    return [Example(source, tuple(targets)) for source, targets in grouped.items()]


def spread_references(examples: Iterable[Example]) -> list[Example]:
    """Give every target its own example, as training wants them."""
    return [Example(example.source, (target,)) for example in examples for target in example.targets]


def _texts(field: Any, column: str, where: str) -> list[str]:
    """The non-empty texts of one field."""
    items = field if isinstance(field, (list, tuple)) else [field]
    for item in items:
        if not isinstance(item, str):
            raise ValueError(
                f"read_table: expected a text or a list of texts in column {column!r}, {where} has "
                f"{json.dumps(field, default=str)[:60]}; choose another column or convert it"
            )
    return [text for item in items if (text := item.strip())]


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"read_table: expected {len(reader.fieldnames or ())} fields a line in {path.name}, "
                        f"line {reader.line_num} has another number; check its quotes and commas"
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(
                f"read_table: expected comma-separated values in {path.name}, got something else near "
                f"line {reader.line_num + 1} ({error}); "
                "check its quotes"
            ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"read_table: expected a JSON object on every line of {path.name}, line {number} is not JSON "
                    f"({error.msg}); correct or delete it"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"read_table: expected a JSON object on every line of {path.name}, line {number} is a "
                    f'{type(row).__name__}; write {{"source": ..., "target": ...}}'
                )
            yield number, row
