"""The self-check passes every configuration on this device; its verdicts decide the tiles of the other tests."""

import os

import pytest
import torch

from prefix_fast import selfcheck
from prefix_fast.backends import triton_vetting
from prefix_fast.backends.triton_vetting import Kind

KINDS = selfcheck.all_kinds()
if os.environ.get("TRITON_INTERPRET") == "1":  # which knows one tile and no precision
    KINDS = [Kind(32, torch.float16, "ieee", False)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kernel_of_a_kind_is_right(kind: Kind, device: str) -> None:
    wanted = selfcheck.configurations([kind])
    verdicts = selfcheck.run(device, wanted)
    assert {str(c): v.failure for c, v in verdicts.items() if v.failure is not None} == {}
    assert set(verdicts) == set(wanted)
    index = torch.cuda.current_device() if device == "cuda" else None
    for configuration in wanted:
        tile, _ = triton_vetting.candidates(index, configuration)
        assert getattr(triton_vetting.tiles_of_call(index, kind), configuration.kernel) == tile
