"""Many prefixes for one model, of which each row of a batch reads one or none."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefix_fast import bank_files, checkpoint
from prefix_fast.choice import Choice, States, check_ids, listed, names_of, pack
from prefix_fast.files import find_folder, upload_folder
from prefix_fast.geometry import SITES, ModelSites, check_same_sites, checked_integer, model_sites
from prefix_fast.prefix import Prefix

_LOADING_ERRORS = (ValueError, TypeError, FileNotFoundError, NotImplementedError)


@dataclass
class _Entry:
    """What the bank remembers of an entry.

    Attributes:
        folder: where it is loaded from when it is read; None: it was given, and stays.
        sites: of the prefix.
        versions: of its tensors when they were loaded; None: it is never dropped.
    """

    folder: Path | None
    sites: ModelSites
    versions: tuple[int, ...] | None = None


class PrefixBank(nn.Module):
    """Prefixes under names, of different lengths, for one model: `patch(model, bank)`.

    Every entry is its own module (parameters `<name>.sites...`; in a patched model `prefix.<name>.sites...`) and gets
    the gradients of the rows that read it. An entry that no row of a batch reads takes no part in it: its gradients are
    None, or exactly zero where the ids are on a GPU or traced, where nobody on the host knows them. Adding and removing
    entries leaves the other modules, their numbers and an optimiser's state for them alone; what is added later has
    to be given to the optimiser, too.

    With a limit, entries that are given as folders are loaded when first read, frozen, and the least recently read
    ones are dropped again. One that was changed since, has gradients or requires them is never dropped, nor are
    prefixes that were given as modules, nor what the running call reads: then the limit is exceeded.

    Args:
        prefixes: name → a Prefix, a folder or a Hub id. Names are non-empty strings without dots.
        max_loaded: how many entries to keep in memory; None: no limit.
        max_bytes: how many bytes of them; None: no limit.
        model_config: the transformers config of the model, which every entry is then checked against. `patch` does so
            too. Files of PEFT for an encoder-decoder with fewer decoder than encoder layers need it here.

    Raises:
        TypeError, ValueError: a name or prefix of another type, two prefixes for different models.
        FileNotFoundError, NotImplementedError: as `Prefix.from_pretrained`. Messages name the entry.
    """

    _place: Tensor

    def __init__(
        self,
        prefixes: Mapping[str, Prefix | str | PathLike[str]] | None = None,
        *,
        max_loaded: int | None = None,
        max_bytes: int | None = None,
        model_config: Any = None,
    ) -> None:
        super().__init__()
        for name, limit in (("max_loaded", max_loaded), ("max_bytes", max_bytes)):
            if limit is not None:
                checked_integer(limit, name, 1, "PrefixBank")
        if prefixes is not None and not isinstance(prefixes, Mapping):
            raise TypeError(
                f"PrefixBank: expected a mapping from names to prefixes, got {type(prefixes).__name__}; pass"
                ' {"name": prefix_or_folder, ...}'
            )
        self.max_loaded, self.max_bytes = max_loaded, max_bytes
        self._offered = None if model_config is None else model_sites(model_config)
        self._entries: dict[str, _Entry] = {}
        self._recent: dict[str, None] = {}  # loaded on demand, least recently read first
        self._reading: Counter[str] = Counter()
        self.register_buffer("_place", torch.empty(0), persistent=False)  # says where the module was moved to
        for name, prefix in (prefixes or {}).items():
            self.add(name, prefix)

    @property
    def names(self) -> list[str]:
        """In the order in which they came; an integer id is a position in this list."""
        return list(self._entries)

    @property
    def loaded(self) -> list[str]:
        """The names of the entries that are in memory."""
        return [name for name in self._entries if name in self._modules]

    @property
    def sites(self) -> tuple[str, ...]:
        """The attentions that the entries read at; those of an empty bank are not known yet: all."""
        first = next(iter(self._entries.values()), None)
        return SITES if first is None else tuple(first.sites.geometries)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters and buffers that are in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.parameters(), *self.buffers()))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> Prefix:
        """The entry's module, loaded if it is not. `requires_grad_()` on one that was loaded on demand keeps it."""
        self._check_known(name)
        return self._read([name])[0]

    def add(self, name: str, prefix: Prefix | str | PathLike[str]) -> None:
        """Add an entry at the end; raises as the class does, and then changes nothing."""
        self._check_name(name)
        if isinstance(prefix, Prefix):
            if any(prefix is module for module in self._modules.values()):
                raise ValueError(f"PrefixBank: expected a prefix of its own for {name!r}, got that of another entry")
            folder, found = None, prefix.model_sites
        elif isinstance(prefix, (str, PathLike)):
            with _naming(name):
                folder = find_folder(prefix, checkpoint.FILES)
                found = checkpoint.describe(folder, expected=self._offered)[2]
        else:
            raise TypeError(
                f"PrefixBank: expected {name!r} to be a Prefix, a folder or a Hub id, got {type(prefix).__name__}"
            )
        self._check_sites(name, found)
        entry = _Entry(folder, found)
        if isinstance(prefix, Prefix):
            self._place_module(name, prefix)
        elif self.max_loaded is None and self.max_bytes is None:
            self._place_module(name, self._loaded(name, entry))
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Take an entry away. The names after it move up by one position.

        Raises:
            KeyError: there is none of that name. ValueError: a running `generate` reads it.
        """
        self._check_known(name)
        if self._reading[name]:
            raise ValueError(
                f"PrefixBank.remove: expected an entry that nothing reads, got {name!r}, which a running generate"
                " reads; remove it afterwards"
            )
        del self._entries[name]
        self._modules.pop(name, None)
        self._recent.pop(name, None)

    def forward(self, prefix_ids: Any, rows: int | None = None) -> tuple[States, Choice | None]:
        """The packed keys and values of the entries that a batch reads, and which row reads which.

        Args:
            prefix_ids: for each row a name or None, in a list; or [B] integers, positions in `names`, -1 for none.
            rows: B, if known.

        Returns:
            {site: (keys, values)}, each [L, Hkv, total, D], and the choice. If no row reads any: {} and None.

        Raises:
            ValueError: an unknown name, an id out of range, another number of rows. TypeError: of another type.
        """
        ids, names = self._chosen(prefix_ids, rows)
        if not names:
            return {}, None
        prefixes = self._read(names)
        choice = Choice.of(ids, names, [prefix.num_virtual_tokens for prefix in prefixes])
        return pack([prefix() for prefix in prefixes]), choice

    def _chosen(self, prefix_ids: Any, rows: int | None) -> tuple[Tensor, list[str]]:
        """Ids [B] on the bank's device, and the names that they are positions in."""
        check_ids(prefix_ids, rows)
        if isinstance(prefix_ids, Tensor):
            on_host = prefix_ids.device.type == "cpu" and not torch.compiler.is_compiling()
            if not on_host and len(self.loaded) == len(self):  # otherwise the ids say what has to be loaded
                return prefix_ids.to(self._place.device), self.names
        chosen = names_of(prefix_ids, self._entries)
        read = set(chosen)
        names = [name for name in self._entries if name in read]
        positions: dict[str | None, int] = {name: position for position, name in enumerate(names)}
        ids = [positions.get(name, -1) for name in chosen]
        return torch.tensor(ids, dtype=torch.long, device=self._place.device), names

    @contextmanager
    def in_use(self, names: Iterable[str]) -> Iterator[None]:
        """For the time of one `generate`, entries that cannot be removed."""
        held = Counter(names)
        self._reading.update(held)
        try:
            yield
        finally:
            self._reading.subtract(held)

    def check_fits(self, model_config: Any) -> None:
        """Raise ValueError, naming the entry, if one is not for this model; see `Prefix.check_fits`."""
        offered = model_sites(model_config)
        for name, entry in self._entries.items():
            with _naming(name):
                found = entry.sites
                if entry.folder is not None and name not in self._modules:
                    found = checkpoint.describe(entry.folder, expected=offered)[2]
                check_same_sites(found, offered, "PrefixBank")

    def bind(self, model_config: Any) -> None:
        """From now on, take entries for this model alone."""
        self._offered = model_sites(model_config)

    def _check_name(self, name: Any) -> None:
        if not isinstance(name, str):
            raise TypeError(f"PrefixBank: expected names to be strings, got {name!r} ({type(name).__name__})")
        if not name or "." in name or not name.isprintable() or len(bank_files.folder_of(name)) > 200:
            raise ValueError(
                f"PrefixBank: expected a printable name without dots, of 1 to 200 characters, got {name!r}; it becomes"
                " a part of parameters' names and the name of a folder"
            )
        if name in self._entries:
            raise ValueError(f"PrefixBank.add: expected a new name, got {name!r}, which is there; remove it first")

    def _check_known(self, name: Any) -> None:
        if name not in self._entries:
            raise KeyError(f"PrefixBank: expected a name in the bank, got {name!r}; it has {listed(self.names)}")

    def _check_sites(self, name: str, found: ModelSites) -> None:
        with _naming(name):
            if self._offered is not None:
                check_same_sites(found, self._offered, "PrefixBank")
        other, entry = next(iter(self._entries.items()), (name, None))
        if entry is not None and entry.sites != found:
            raise ValueError(
                f"PrefixBank: expected {name!r} to be for the model and sites of the other entries, {entry.sites}"
                f" of {other!r}, got {found}; a bank is for one model"
            )

    def _read(self, names: Iterable[str]) -> list[Prefix]:
        """The modules; those that are not in memory are loaded, and others dropped for them."""
        names = list(names)
        for name in names:
            entry = self._entries[name]
            if name not in self._modules:
                self._place_module(name, self._loaded(name, entry).requires_grad_(False))
                entry.versions = self._versions(name)
                self._drop(set(names))
            if entry.versions is not None:
                self._recent.pop(name, None)
                self._recent[name] = None
        return [self._modules[name] for name in names]  # type: ignore[misc]

    def _loaded(self, name: str, entry: _Entry) -> Prefix:
        # What is made under inference_mode could never be trained.
        with _naming(name), torch.inference_mode(False):
            return Prefix.from_pretrained(entry.folder, model_config=self._offered or entry.sites)  # type: ignore[arg-type]

    def _place_module(self, name: str, prefix: Prefix) -> None:
        if not prefix.shifts_positions:
            raise ValueError(
                f"PrefixBank: expected prefixes that shift positions, got {name!r}, which does not; patch a model with"
                " it alone"
            )
        with torch.inference_mode(False):
            self._modules[name] = prefix.to(self._place.device).train(self.training)

    def _drop(self, kept: set[str]) -> None:
        for name in [name for name in self._recent if name not in kept]:
            fits = self.max_loaded is None or len(self.loaded) <= self.max_loaded
            if fits and (self.max_bytes is None or self.nbytes <= self.max_bytes):
                return
            if self._is_as_loaded(name):
                del self._modules[name], self._recent[name]

    def _versions(self, name: str) -> tuple[int, ...]:
        module = self._modules[name]
        return tuple(tensor._version for tensor in (*module.parameters(), *module.buffers()))  # type: ignore[union-attr]

    def _is_as_loaded(self, name: str) -> bool:
        """Whether its folder holds all there is to know of a loaded entry."""
        parameters = list(self._modules[name].parameters())  # type: ignore[union-attr]
        free = all(parameter.grad is None and not parameter.requires_grad for parameter in parameters)
        return free and self._entries[name].versions == self._versions(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixBank:
        same = [name for name in self._recent if self._is_as_loaded(name)]
        super()._apply(fn, recurse)
        for name in same:  # moved, not changed
            self._entries[name].versions = self._versions(name)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles: tensors in them count their versions anew."""
        changed = {name for name in self._recent if not self._is_as_loaded(name)}
        entries = {
            name: replace(entry, versions=None if name in changed else entry.versions)
            for name, entry in self._entries.items()
        }
        recent = {name: None for name in self._recent if name not in changed}
        return {**self.__dict__, "_entries": entries, "_recent": recent, "_reading": Counter()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self._recent:
            self._entries[name].versions = self._versions(name)

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Write a folder for each entry, as `Prefix.save_pretrained` does, and their names in `prefix_bank.json`.

        All of it is written before the first folder is put in its place, and an error puts earlier ones back. An
        earlier bank's other entries are removed.

        Raises:
            ValueError: a file in the place of a folder, a folder of that name that is no entry of an earlier bank;
                as `Prefix.save_pretrained`, naming the entry.
        """
        writers = {name: functools.partial(self._write, name) for name in self._entries}
        bank_files.save(Path(save_directory), writers, [entry.folder for entry in self._entries.values()])

    def _write(self, name: str, place: Path) -> None:
        entry = self._entries[name]
        with _naming(name):
            prefix = self._modules[name] if name in self._modules else self._loaded(name, entry)
            prefix.save_pretrained(place)  # type: ignore[operator, union-attr]

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        max_loaded: int | None = None,
        max_bytes: int | None = None,
        model_config: Any = None,
        **hub_options: Any,
    ) -> PrefixBank:
        """The bank in a folder or Hub repository that save_pretrained wrote.

        Args:
            source: a folder, or a Hub id.
            max_loaded, max_bytes, model_config: as of PrefixBank.
            hub_options: revision, token, cache_dir, local_files_only, as of Prefix.from_pretrained.
        """
        entries = bank_files.find(source, **hub_options)
        return cls(entries, max_loaded=max_loaded, max_bytes=max_bytes, model_config=model_config)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what save_pretrained writes; as `Prefix.push_to_hub`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload_folder(folder, repo_id, **options)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the entry's name before the messages of what is read for it."""
    try:
        yield
    except _LOADING_ERRORS as error:
        kind = next(kind for kind in _LOADING_ERRORS if isinstance(error, kind))
        raise kind(f"PrefixBank entry {name!r}: {error}") from error
