"""Files that can be trusted: written whole or not at all, and checked before their numbers are read."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = ("F64", "F32", "F16", "BF16")
# namespace/name or name, as the Hub allows; no empty part and none that begins with a dot.
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files, all or none: every one is on disk before the first is renamed into place.

    An error puts earlier files back. A crash between two renames can leave files of two checkpoints, each whole;
    their readers compare shapes.
    """
    mark = secrets.token_hex(8)
    staged = {folder / name: folder / f".{name}.{mark}.tmp" for name in contents}
    backups = {target: folder / f".{target.name}.{mark}.bak" for target in staged if target.is_file()}
    try:
        for target, temporary in staged.items():
            with open(temporary, "xb") as file:
                file.write(contents[target.name])
                file.flush()
                os.fsync(file.fileno())
        for target, backup in backups.items():
            shutil.copyfile(target, backup)
        try:
            for target, temporary in staged.items():
                os.replace(temporary, target)
        except BaseException:
            for target, temporary in staged.items():
                if temporary.exists():
                    continue  # this one was not renamed
                if target in backups:
                    backups[target].replace(target)
                else:
                    target.unlink()
            raise
    finally:
        for leftover in (*staged.values(), *backups.values()):
            leftover.unlink(missing_ok=True)
    _sync_folder(folder)


def replace_folders(
    parent: Path, fill: Mapping[str, Callable[[Path], None]], contents: Mapping[str, bytes], removed: Sequence[str]
) -> None:
    """Write the folders and then the files in `parent`, all or none, and take the folders `removed` away.

    An error puts earlier folders and files back. A crash between two renames can leave folders of two states, each
    whole.

    Args:
        parent: made if it is not there.
        fill: folder → what writes it into an empty one that is put in its place.
        contents: as of replace_files; they appear last.
        removed: folders in `parent`.
    """
    parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(8)
    staged = {name: parent / f".{name}.{mark}.tmp" for name in fill}
    backups = {name: parent / f".{name}.{mark}.bak" for name in (*fill, *removed) if (parent / name).exists()}
    placed: list[str] = []
    try:
        for name, temporary in staged.items():
            temporary.mkdir()
            fill[name](temporary)
        try:
            for name in (*fill, *removed):
                placed.append(name)
                if name in backups:
                    os.replace(parent / name, backups[name])
                if name in staged:
                    os.replace(staged[name], parent / name)
            replace_files(parent, contents)
        except BaseException:
            for name in placed:
                if name in staged and not staged[name].exists():
                    shutil.rmtree(parent / name)
                if name in backups and backups[name].exists():
                    os.replace(backups[name], parent / name)
            raise
    finally:
        for leftover in (*staged.values(), *backups.values()):
            shutil.rmtree(leftover, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make the renames last through a power cut, where the system can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def find_folder(
    source: str | PathLike[str],
    names: list[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a prefix: the folder itself, or the Hub's files, downloaded to huggingface_hub's cache.

    Raises:
        TypeError: source is no path. ValueError: a file, or neither a folder nor a possible Hub id.
        FileNotFoundError: the Hub id cannot be fetched (with the reason).
    """
    if not isinstance(source, (str, PathLike)):
        raise TypeError(
            f"Prefix.from_pretrained: expected a folder or a Hub id, got {type(source).__name__}; pass a path"
        )
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"Prefix.from_pretrained: expected a folder, got the file {folder}; pass the folder it is in")
    if not isinstance(source, str) or not HUB_ID.fullmatch(source) or ".." in source:
        raise ValueError(
            f"Prefix.from_pretrained: expected a folder or a Hub id, got {str(source)!r}, which is neither; check "
            "the path"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=names,
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"Prefix.from_pretrained: expected a folder or a Hub repository that can be fetched, got {source!r}: "
            f"no such folder here, and the Hub answers {type(error).__name__}: {error}; check the name and the "
            "connection"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in the file; ValueError if it is none."""
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Prefix.from_pretrained: expected JSON in {file}, got {error}; the file is damaged, save it again"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"Prefix.from_pretrained: expected a JSON object in {file}, got a {type(config).__name__}; the file is "
            "damaged, save it again"
        )
    return config


def read_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The named tensors in float32; names, shapes and dtypes are checked in the header before any is loaded."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as archive:
            _check_header(file, archive, shapes)
            tensors = {name: archive.get_tensor(name).to(torch.float32) for name in shapes}
    except SafetensorError as error:
        with open(file, "rb") as opened:
            start = opened.read(2)
        what = "a pickle under another name" if start in (b"PK", b"\x80\x02") else str(error)
        raise ValueError(
            f"Prefix.from_pretrained: expected a safetensors file, got {file}: {what}; it is truncated or no "
            "safetensors file, save it again"
        ) from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{file}: expected finite numbers in {name!r}, got NaN or infinity; the training had diverged, use an "
                "earlier checkpoint"
            )
    return tensors


def _check_header(file: Path, archive: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    names = set(archive.keys())
    if names != set(shapes):
        raise ValueError(
            f"{file}: expected the tensors {sorted(shapes)}, got {sorted(names)}; a prefix holds keys and values "
            "alone: load other files, and adapters with further trained modules, with peft"
        )
    for name, shape in shapes.items():
        entry = archive.get_slice(name)
        found, dtype = tuple(entry.get_shape()), entry.get_dtype()
        if found != shape:
            raise ValueError(
                f"{file}: expected {name!r} of shape {shape} as its config says, got {found}; the two files do not "
                "belong together, save them again"
            )
        if dtype not in DTYPES:
            raise TypeError(f"{file}: expected {name!r} in one of {', '.join(DTYPES)}, got {dtype}; convert it to F32")


def upload_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload prefix",
) -> str:
    """Upload a folder to a Hub repository, made if missing; returns the commit's URL."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message).commit_url)
