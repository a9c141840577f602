"""Which tile a launch uses: the table's once a self-check has passed on this card, the small safe one otherwise.

Where tuning has found a faster one that passed too, that one; PREFIX_FAST_TUNED=0 leaves it out.

Some blocks are compiled to wrong code on some cards, and nothing but running them there shows it (triton-lang/triton
#6124, fla-org/flash-linear-attention #640, #984). A verdict is about one configuration: a kernel, the padded head dim,
the dtypes and the precision of products. `prefix_fast.selfcheck` finds verdicts; here they are kept, in memory and as
one small JSON file each, by card, driver, versions and kernel sources. A launch looks one up and never checks.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefix_fast.backends.triton_config import Tile, Tiles, device_of, padded, precision_of, safe_tiles, tiles_for
from prefix_fast.backends.triton_neighbours import neighbours
from prefix_fast.files import replace_files

KERNELS = Tiles._fields
OLDEST_CAPABILITY = (8, 0)
_FORMAT = 3  # of the files, and of what is checked
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Kind(NamedTuple):
    """What a call's kernels are compiled for, beside its flags."""

    block_d: int  # head dim, padded to a power of two
    dtype: torch.dtype
    precision: str  # of float32 products
    mixed: bool  # float32 segments beside half-precision queries

    def __str__(self) -> str:
        precision = f"-{self.precision}" if self.dtype == torch.float32 else ""
        return f"D{self.block_d}-{_NAMES[self.dtype]}{precision}{'-fp32_prefix' if self.mixed else ''}"


class Configuration(NamedTuple):
    """What a verdict is about."""

    kernel: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kernel}-{self.kind}"


class Trial(NamedTuple):
    """The one kernel of a call that a self-check runs, and the tile that it tries."""

    kernel: str
    tile: Tile


class Verdict(NamedTuple):
    """What a self-check found, and tuning after it. The safe tile is checked where the table's fails."""

    tile: Tile  # of the table
    safe_tile: Tile
    failure: str | None  # of the table's tile; None: it passed
    safe_failure: str | None = None
    tuned: Tile | None = None  # the fastest that passed, be it one of these; None: nothing was timed

    @property
    def checked(self) -> Tile:
        """The tile that calls use where nothing was timed."""
        return self.tile if self.failure is None else self.safe_tile

    @property
    def used(self) -> Tile:
        """The tile that calls use."""
        if self.tuned is None or os.environ.get("PREFIX_FAST_TUNED") == "0":
            return self.checked
        return self.tuned

    @property
    def refused(self) -> bool:
        """Whether no tile gives right results."""
        return self.failure is not None and (self.tile == self.safe_tile or self.safe_failure is not None)


class Environment(NamedTuple):
    """What a verdict holds for."""

    card: str
    capability: str
    driver: str
    triton: str
    torch: str
    kernels: str  # hash of the sources
    format: int = _FORMAT


_verdicts: dict[tuple[Environment, Configuration], Verdict | None] = {}
_tiles: dict[tuple[int | None, Kind], Tiles] = {}
_refusals: dict[tuple[int | None, Kind], list[str]] = {}
_warned: set[tuple[Any, ...] | str] = set()


def kind_of(head_dim: int, dtype: torch.dtype, mixed: bool) -> Kind:
    """The kind of a call, under the present `torch.get_float32_matmul_precision`."""
    return Kind(padded(head_dim), dtype, precision_of(dtype, head_dim), mixed)


def tiles_of_call(index: int | None, kind: Kind) -> Tiles:
    """The tiles that a call on device `index` uses; None: the interpreter. Warns once of each that failed."""
    found = _tiles.get((index, kind))
    return _choose_tiles(index, kind) if found is None else found


def refusals(index: int | None, kind: Kind) -> list[str]:
    """Why the kernels cannot run on device `index`: one line for each that is wrong with its safe tile too."""
    found = _refusals.get((index, kind))
    if found is None:
        found = [
            f"the self-check found the {kernel} kernel wrong on this device for {kind}, with its safe tile too: "
            f"{verdict.safe_failure or verdict.failure}; run prefix-fast doctor --recheck after an upgrade"
            for kernel in KERNELS
            if (verdict := verdict_of(index, Configuration(kernel, kind))) is not None and verdict.refused
        ]
        _refusals[index, kind] = found
    return found


@functools.cache
def device_refusals(index: int) -> tuple[str, ...]:
    """Why the device cannot run the kernels at all. Empty: it can."""
    properties = torch.cuda.get_device_properties(index)
    found = (properties.major, properties.minor)
    if torch.version.hip is not None or found >= OLDEST_CAPABILITY:
        return ()
    oldest, got = (".".join(map(str, capability)) for capability in (OLDEST_CAPABILITY, found))
    return (f"expected compute capability {oldest} or later, got {got} ({properties.name})",)


def verdict_of(index: int | None, configuration: Configuration) -> Verdict | None:
    """What is known of a configuration's present tiles, from memory or disk; None: it is unchecked."""
    key = (environment_of(index), configuration)
    if key not in _verdicts:
        _verdicts[key] = _read(*key, choices(index, configuration))
    return _verdicts[key]


def record(
    index: int | None, configuration: Configuration, failure: str | None, safe_failure: str | None,
    tuned: Tile | None = None,
) -> Verdict:  # fmt: skip
    """Keep what was found, in memory and on disk; every process writes a file of its own and renames it."""
    environment = environment_of(index)
    verdict = Verdict(*candidates(index, configuration), failure, safe_failure, tuned)
    _verdicts[environment, configuration] = verdict
    _tiles.clear()
    _refusals.clear()
    write_record(environment, str(configuration), _entry(environment, configuration, verdict))
    return verdict


def record_file(environment: Any, name: str) -> Path:
    """Where what is known under a name in an environment, which JSON can write, lies."""
    folder = hashlib.sha256(json.dumps(environment).encode()).hexdigest()[:16]
    return cache_folder() / "selfcheck" / folder / f"{name}.json"


def write_record(environment: Any, name: str, entry: dict[str, Any]) -> None:
    """Write it there; warns once where that cannot be."""
    try:
        file = record_file(environment, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_files(file.parent, {file.name: json.dumps(entry).encode()})
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        if "unwritable" not in _warned:
            _warned.add("unwritable")
            warnings.warn(
                f"prefix_fast: expected to keep the results of the self-check in the cache folder, got {error}; they "
                "last for this process: set PREFIX_FAST_CACHE to a folder that can be written",
                stacklevel=4,
            )


def cache_folder() -> Path:
    """PREFIX_FAST_CACHE, or prefix_fast in the user's cache folder."""
    chosen, shared = os.environ.get("PREFIX_FAST_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if chosen:
        return Path(chosen)
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "prefix_fast"


@functools.cache
def environment_of(index: int | None) -> Environment:
    """What verdicts about device `index` hold for; None: the interpreter."""
    import triton

    if index is None:
        card, capability, driver = "interpreter", "", ""
    else:
        properties = torch.cuda.get_device_properties(index)
        card = properties.name
        capability = f"{properties.major}.{properties.minor} {getattr(properties, 'gcnArchName', '')}".strip()
        driver = driver_of()
    return Environment(card, capability, driver, triton.__version__, str(torch.__version__), _hash_of_kernels())


def _choose_tiles(index: int | None, kind: Kind) -> Tiles:
    chosen = {}
    for kernel in KERNELS:
        configuration = Configuration(kernel, kind)
        verdict = verdict_of(index, configuration)
        table, safe = candidates(index, configuration)
        if verdict is None:
            chosen[kernel] = table if index is None else safe  # the interpreter compiles nothing
            continue
        chosen[kernel] = verdict.used
        if verdict.failure is not None and verdict.used == safe:
            _warn_of_failure(environment_of(index), configuration, verdict)
    _tiles[index, kind] = Tiles(**chosen)
    return _tiles[index, kind]


def _warn_of_failure(environment: Environment, configuration: Configuration, verdict: Verdict) -> None:
    if (environment, configuration) not in _warned:
        _warned.add((environment, configuration))
        warnings.warn(
            f"prefix_fast: the self-check found the triton configuration {configuration} wrong on {environment.card}, "
            f"so a slower safe tile is used: {verdict.failure}; prefix-fast doctor shows all of them",
            stacklevel=2,
        )


def warn_of_room(device: torch.device, configuration: Configuration, error: str) -> None:
    """Say once that a configuration does not fit the device in a call."""
    index = device.index if device.type == "cuda" else None
    key = (environment_of(index), configuration, "room")
    if key not in _warned:
        _warned.add(key)
        warnings.warn(
            f"prefix_fast: expected {key[0].card} to have room for the triton configuration {configuration} with this "
            f"call's options, got {error}; a slower safe tile is used",
            stacklevel=2,
        )


def candidates(index: int | None, configuration: Configuration) -> tuple[Tile, Tile]:
    """The table's tile and the safe one."""
    kernel, kind = configuration
    table = tiles_for(device_of(index), *kind)
    return getattr(table, kernel), getattr(safe_tiles(kind.block_d), kernel)


def choices(index: int | None, configuration: Configuration) -> tuple[Tile, ...]:
    """What tuning chooses from: the table's tile, the safe one, and the table's neighbours."""
    table, safe = candidates(index, configuration)
    kernel, kind = configuration
    near = neighbours(device_of(index), kernel, table, kind.block_d, kind.dtype.itemsize, kind.mixed)
    return table, safe, *(tile for tile in near if tile != safe)


def _entry(environment: Environment, configuration: Configuration, verdict: Verdict) -> dict[str, Any]:
    tiles = {"tile": list(verdict.tile), "safe_tile": list(verdict.safe_tile)}
    tuned = None if verdict.tuned is None else list(verdict.tuned)
    found = {"failure": verdict.failure, "safe_failure": verdict.safe_failure, "tuned": tuned}
    return {"environment": environment._asdict(), "configuration": str(configuration), **tiles, **found}


def _read(environment: Environment, configuration: Configuration, tiles: tuple[Tile, ...]) -> Verdict | None:
    """The verdict on disk; None where there is none, or the file is damaged or about something else."""
    try:
        entry = json.loads(record_file(environment, str(configuration)).read_bytes())
        tuned = None if entry["tuned"] is None else tiles[tiles.index(tuple(entry["tuned"]))]
        verdict = Verdict(tiles[0], tiles[1], entry["failure"], entry["safe_failure"], tuned)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: no home folder, deep nesting
        return None
    texts = all(found is None or isinstance(found, str) for found in (verdict.failure, verdict.safe_failure))
    return verdict if texts and entry == _entry(environment, configuration, verdict) else None


def driver_of() -> str:
    """The driver, as the kernel module says it; where none does, the CUDA version that it serves."""
    for file in (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")):
        try:
            return file.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
        except (OSError, IndexError):
            continue
    served = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"CUDA {served()}" if served is not None else ""


@functools.cache
def _hash_of_kernels() -> str:
    spec = importlib.util.find_spec("prefix_fast.kernels")
    digest = hashlib.sha256()
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
