"""Where the tests of this folder run: on a device or, with TRITON_INTERPRET=1, in Triton's interpreter on the CPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
ON_CARD = torch.cuda.is_available() and not INTERPRETING
if ON_CARD:
    os.environ["PREFIX_FAST_TEST_DEVICE"] = "cuda"  # read by test_operator_properties


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", metavar="I/N", help="run every Nth test, from the Ith on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, shards = map(int, config.getoption("--shard").split("/"))
    items[:] = items[shard::shards]
    if not ON_CARD:
        for item in items:
            if item.get_closest_marker("card"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


def pytest_runtestloop(session: pytest.Session) -> None:
    if not (ON_CARD or INTERPRETING or session.config.option.collectonly):
        pytest.exit("no CUDA or ROCm device, and TRITON_INTERPRET is not 1: nothing was run", returncode=2)


@pytest.fixture(scope="session")
def device() -> str:
    """Of the tensors that the tests make."""
    return "cuda" if ON_CARD else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The verdicts of the self-check: of the run that PREFIX_FAST_CACHE names, or of this session; never the user's."""
    with pytest.MonkeyPatch.context() as patch:
        if "PREFIX_FAST_CACHE" not in os.environ:
            patch.setenv("PREFIX_FAST_CACHE", str(tmp_path_factory.mktemp("prefix_fast_cache")))
        yield


@pytest.fixture(scope="session")
def folder() -> Path:
    """The checkout's tests."""
    return Path(__file__).resolve().parent.parent
