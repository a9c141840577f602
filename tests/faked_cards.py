"""Cards that this machine does not have, as far as the choice of backends and tiles can tell."""

import types

import torch

from prefix_fast import selfcheck
from prefix_fast.backends import triton_vetting
from prefix_fast.backends.triton_config import device_of, tiles_for
from prefix_fast.backends.triton_vetting import Configuration, Kind

KIND = Kind(64, torch.bfloat16, "ieee", False)
DKV = Configuration("dkv", KIND)


def forget():
    """Everything that a new process would not know of devices and of the verdicts about their tiles."""
    for name in ("_verdicts", "_tiles", "_refusals", "_warned"):
        getattr(triton_vetting, name).clear()
    selfcheck._vetted.clear()
    for function in (triton_vetting.device_refusals, triton_vetting.environment_of, device_of):
        function.cache_clear()


def fake_cards(monkeypatch, *capabilities):
    """Cards of these compute capabilities; returns their properties, which the test may change."""
    cards = [
        types.SimpleNamespace(name=f"Card {index}", major=major, minor=minor, multi_processor_count=8)
        for index, (major, minor) in enumerate(capabilities)
    ]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: cards[0].name)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return cards


def table_tile(kernel="dkv", kind=KIND):
    return getattr(tiles_for(device_of(0), *kind), kernel)


def files(tmp_path):
    return sorted(path for path in tmp_path.rglob("*") if path.is_file())
