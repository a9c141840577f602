"""A bank on disk: a folder for each entry, as a prefix alone is saved, and an index with their names in order.

DIR/prefix_bank.json            {"format_version": 1, "names": ["alice", ...]}
DIR/alice/adapter_config.json, adapter_model.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefix_fast import checkpoint
from prefix_fast.files import find_folder, read_json, replace_folders
from prefix_fast.geometry import checked_integer

INDEX = "prefix_bank.json"
VERSION = 1


def folder_of(name: str) -> str:
    """The folder of an entry, in the bank's."""
    return quote(name, safe="")


def holds_bank(source: Any) -> bool:
    """Whether a path is the folder of a bank."""
    return isinstance(source, (str, PathLike)) and (Path(source) / INDEX).is_file()


def save(folder: Path, writers: Mapping[str, Callable[[Path], None]], sources: Sequence[Path | None]) -> None:
    """Write a bank, all of it or nothing; entries of an earlier one that are not in it are removed.

    Args:
        folder: made if it is not there.
        writers: name → what writes the entry into a folder.
        sources: folders that entries are still to be loaded from; they stay.

    Raises:
        ValueError: a file in the place of the folder, or something that no earlier bank wrote in an entry's.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"PrefixBank.save_pretrained: expected a folder, got the file {folder}; pass a folder")
    earlier = set(_read_names(folder)) if holds_bank(folder) else set()
    for name in writers:
        if name not in earlier and (folder / folder_of(name)).exists():
            raise ValueError(
                f"PrefixBank.save_pretrained: expected a free place for {name!r}, got {folder / folder_of(name)}, which"
                " no earlier bank wrote; use another folder"
            )
    index = json.dumps({"format_version": VERSION, "names": list(writers)}, indent=2)
    gone = [folder_of(name) for name in earlier if name not in writers and folder / folder_of(name) not in sources]
    fill = {folder_of(name): writer for name, writer in writers.items()}
    replace_folders(folder, fill, {INDEX: index.encode()}, gone)


def find(source: str | PathLike[str], **hub_options: Any) -> dict[str, Path]:
    """The folder of each entry of a bank in a folder or Hub repository.

    Raises:
        FileNotFoundError: there is none. ValueError: a damaged index.
    """
    folder = find_folder(source, [INDEX, *(f"*/{name}" for name in checkpoint.FILES)], **hub_options)
    if not holds_bank(folder):
        raise FileNotFoundError(
            f"PrefixBank.from_pretrained: expected {INDEX} in {folder}, got none; pass the folder that save_pretrained"
            " of a bank wrote"
        )
    return {name: folder / folder_of(name) for name in _read_names(folder)}


def _read_names(folder: Path) -> list[str]:
    index = read_json(folder / INDEX)
    version = checked_integer(index.get("format_version"), "format_version", 1, INDEX)
    names = index.get("names")
    if version > VERSION or not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"{folder / INDEX}: expected format_version {VERSION} and names, got {version} and {names!r}; the file is"
            " damaged, or a newer prefix_fast wrote it"
        )
    return names
