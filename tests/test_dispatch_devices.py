"""Which backend `auto` picks on which device, and every reason for which Triton refuses a call; devices are faked."""

import pytest
import torch
from faked_cards import fake_cards, forget

from prefix_fast import dispatch
from prefix_fast.backends import triton, triton_vetting
from prefix_fast.backends.problem import Facts
from prefix_fast.backends.triton_vetting import Configuration

pytest.importorskip("triton")
HALF = Facts("cuda", torch.bfloat16, 80, ("window", "softcap", "dropout", "packed"))


@pytest.fixture(autouse=True)
def _own_verdicts(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def cards(monkeypatch):
    return fake_cards(monkeypatch, (9, 0), (7, 5))


def refusal(facts):
    with pytest.raises(NotImplementedError) as error:
        dispatch.choose("triton", *facts)
    return str(error.value)


@pytest.mark.usefixtures("cards")
def test_auto_picks_triton_on_cuda_tensors_and_never_on_cpu_tensors(monkeypatch):
    assert dispatch.choose("auto", *HALF) == "triton"
    assert dispatch.choose("triton", *HALF) == "triton"
    assert dispatch.choose("auto", "cpu", torch.float32, 64, ()) in ("cpu", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("auto", "cpu", torch.float32, 64, ()) in ("cpu", "reference")
    assert dispatch.choose("triton", "cpu", torch.float32, 64, ()) == "triton"
    monkeypatch.setenv("PREFIX_FAST_BACKEND", "triton")
    assert dispatch.choose("auto", "cpu", torch.float32, 64, ()) == "triton"


@pytest.mark.usefixtures("cards")
def test_auto_goes_on_to_the_reference_where_triton_refuses():
    for facts in (HALF._replace(head_dim=320), HALF._replace(dtype=torch.float64), HALF._replace(device_index=1)):
        assert dispatch.choose("auto", *facts) == "reference"


@pytest.mark.usefixtures("cards")
def test_each_refusal_says_what_was_expected_and_what_came():
    assert "head dims up to 256, not 320" in refusal(HALF._replace(head_dim=320))
    assert "not float64" in refusal(HALF._replace(dtype=torch.float64))
    assert "takes cuda tensors (on the CPU only with TRITON_INTERPRET=1), not cpu" in refusal(
        HALF._replace(device="cpu")
    )
    old = refusal(HALF._replace(device_index=1))
    assert "expected compute capability 8.0 or later, got 7.5 (Card 1)" in old


@pytest.mark.usefixtures("cards")
@pytest.mark.parametrize(("version", "reason"), [(None, "triton is not installed"), ((3, 5), "expected triton >= 3.6")])
def test_missing_or_old_triton_is_the_reason(monkeypatch, version, reason):
    monkeypatch.setattr(triton, "_triton_version", lambda: version)
    assert reason in refusal(HALF)
    assert dispatch.choose("auto", *HALF) == "reference"


def test_a_machine_without_a_device_is_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA or ROCm device" in refusal(HALF)
    assert dispatch.choose("auto", *HALF) == "reference"


@pytest.mark.usefixtures("cards")
def test_a_configuration_that_fails_with_its_safe_tile_too_is_refused():
    kind = triton_vetting.kind_of(HALF.head_dim, HALF.dtype, mixed=False)
    triton_vetting.record(0, Configuration("dkv", kind), "table is wrong", None)
    assert dispatch.choose("auto", *HALF) == "triton"
    triton_vetting.record(0, Configuration("dkv", kind), "table is wrong", "safe is wrong")
    assert dispatch.choose("auto", *HALF) == "reference"
    assert "dkv kernel wrong on this device for D128-bf16, with its safe tile too: safe is wrong" in refusal(HALF)
    assert dispatch.choose("auto", *HALF._replace(dtype=torch.float16)) == "triton"
    assert dispatch.choose("auto", *HALF._replace(uses=("mixed_prefix",))) == "triton"


@pytest.mark.usefixtures("cards")
def test_full_precision_is_vetted_for_the_precision_in_use():
    kind = triton_vetting.kind_of(64, torch.float32, mixed=False)
    assert kind.precision == "ieee"
    triton_vetting.record(0, Configuration("forward", kind), "wrong", "wrong")
    assert dispatch.choose("auto", "cuda", torch.float32, 64, ()) == "reference"
    torch.set_float32_matmul_precision("high")
    assert dispatch.choose("auto", "cuda", torch.float32, 64, ()) == "triton"


def test_backends_are_listed_in_the_order_of_auto():
    assert [info.name for info in dispatch.backends()] == ["triton", "cuda", "cpu", "reference"]


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_layouts_and_devices_that_no_backend_takes_raise_before_the_choice(backend):
    from prefix_fast import prefix_attention

    query = torch.randn(2, 4, 7, 16)
    prefix = torch.randn(1, 4, 5, 16)
    with pytest.raises(TypeError, match="last dim"):
        prefix_attention(query.transpose(2, 3), query, query, prefix, prefix, backend=backend)
    with pytest.raises(ValueError, match="device"):
        prefix_attention(query, query, query, prefix.to("meta"), prefix.to("meta"), backend=backend)
