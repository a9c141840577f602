"""A machine with the CUDA kernels and a card, as far as the choice of backends can tell."""

import importlib.machinery
from types import SimpleNamespace

import torch

from prefix_fast import selfcheck
from prefix_fast.backends import cuda, cuda_vetting
from prefix_fast.backends.problem import Facts
from prefix_fast.backends.triton_config import device_of

HALF = Facts("cuda", torch.float16, 64, ())
BUILT = importlib.machinery.ModuleSpec(cuda_vetting.MODULE, None)


def forget():
    """Everything that a new process would not know of the installation and of its cards."""
    for function in (cuda._is_built, cuda._device_reason, cuda_vetting.environment_of, device_of):
        function.cache_clear()
    for known in (cuda_vetting._verdicts, cuda_vetting._times):
        known.clear()
    selfcheck._vetted.clear()


def fake_installation(monkeypatch):
    """The kernels, a driver of their toolkit's version, and a card of sm_90; returns the extension."""
    module = SimpleNamespace(driver_version=lambda: 13000, runtime_version=13000, architectures="80_90")
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: BUILT)
    monkeypatch.setattr(cuda, "extension", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    card = SimpleNamespace(name="Card", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    return module
