"""What every test starts from: no network, fixed seeds, full float32 precision, the threads it was given."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores; a test that is about threads sets its own number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
# `python -m pytest` puts the checkout on sys.path, where our kernels folder shadows the package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if "PREFIX_FAST_NATIVE_FOLDER" in os.environ:  # C++ kernels of another build, as `make test-sanitize` makes them
    import prefix_fast

    prefix_fast.__path__.insert(0, str(Path(os.environ["PREFIX_FAST_NATIVE_FOLDER"]).resolve()))


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seeds, defaults and threads as at the start of the session, whatever the test before has set."""
    monkeypatch.delenv("PREFIX_FAST_BACKEND", raising=False)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    torch.set_float32_matmul_precision("highest")
    with torch.enable_grad():
        yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests find out about this machine stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFIX_FAST_CACHE", str(tmp_path_factory.mktemp("prefix_fast_cache")))
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets that PREFIX_FAST_DATA names; tests that need it are skipped without."""
    folder = os.environ.get("PREFIX_FAST_DATA")
    if not folder:
        pytest.skip("PREFIX_FAST_DATA is not set; it names a folder of data sets")
    if not Path(folder).is_dir():
        pytest.skip(f"PREFIX_FAST_DATA names {folder}, which is no folder")
    return Path(folder)


@pytest.fixture
def any_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision compute is let in although the CPU may have no instructions for it."""
    from prefix_fast import half

    monkeypatch.setattr(half, "lacking", lambda *_: None)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A faked card of compute capability 9.0, and a cache of its own."""
    from faked_cards import fake_cards, forget

    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path / "cache"))
    forget()
    yield fake_cards(monkeypatch, (9, 0))[0]
    forget()
