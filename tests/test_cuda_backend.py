"""The cuda backend on machines that cannot run it: why not, in words; and how its kernels are compiled."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_cards import HALF, fake_installation, forget

from prefix_fast import cuda_build, dispatch, testing
from prefix_fast.backends import cuda
from prefix_fast.backends.problem import Grads
from prefix_fast.testing import Case


@pytest.fixture(autouse=True)
def _nothing_known():
    forget()
    yield
    forget()


@pytest.fixture
def built(monkeypatch):
    """An installation with the kernels, which the test may change."""
    return fake_installation(monkeypatch)


def test_a_machine_with_everything_serves_a_call(built):
    assert cuda.availability() is None
    assert dispatch.unsupported_reasons("cuda", HALF) == []
    assert dispatch.choose("cuda", *HALF) == "cuda"


def test_an_installation_without_the_kernels_says_how_to_compile_them(monkeypatch):
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    assert "built without the CUDA kernels; `prefix-fast build-cuda`" in cuda.availability()


def test_an_extension_that_does_not_load_is_a_reason(built, monkeypatch):
    def broken():
        raise ImportError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(cuda, "extension", broken)
    assert "cannot be loaded (libfoo.so: cannot open" in cuda.availability()


def test_the_kernels_describe_themselves_where_they_are_compiled(built, monkeypatch):
    assert cuda.description() == {"architectures": "sm_80, sm_90", "toolkit": "13.0", "driver": "13.0"}
    monkeypatch.setattr(cuda, "extension", lambda: importlib.import_module("prefix_fast._not_built"))
    assert cuda.description() == {}


def test_a_machine_without_a_driver_is_a_reason(built):
    built.driver_version = lambda: 0
    assert cuda.availability() == "this machine has no CUDA driver"


@pytest.mark.parametrize(("driver", "runs"), [(12080, False), (13000, True), (13020, True), (14000, True)])
def test_a_driver_of_an_older_major_version_is_a_reason(built, driver, runs):
    built.driver_version = lambda: driver
    reason = cuda.availability()
    assert runs or reason.startswith("the driver is for CUDA 12.8, older than the toolkit 13.0")
    assert not runs or reason is None


def test_a_driver_without_a_card_is_a_reason(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert cuda.availability() == "PyTorch finds no CUDA device on this machine"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((8, 0), True), ((8, 6), True), ((8, 9), True), ((9, 0), True), ((10, 0), False), ((7, 5), False)],
)
def test_a_card_runs_machine_code_of_its_major_version_up_to_its_own(built, monkeypatch, capability, runs):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reasons = cuda.unsupported_reasons(HALF)
    assert (reasons == []) == runs
    assert runs or "compiled for sm_80, sm_90, and the card is sm_" in reasons[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "takes float32, bfloat16 and float16, not float64"),
        ({"head_dim": 20}, "head dims that are multiples of 8 up to 256 in float16, not 20"),
        ({"dtype": torch.float32, "head_dim": 6}, "multiples of 4 up to 256 in float32, not 6"),
        ({"head_dim": 264}, "up to 256"),
        ({"uses": ("many_sets",)}, "at most 4 segment sets"),
        ({"device": "cpu"}, "takes cuda tensors, not cpu"),
    ],
)
def test_what_the_backend_does_not_serve_has_a_reason(built, change, message):
    with pytest.raises(NotImplementedError, match=message):
        dispatch.choose("cuda", *HALF._replace(**change))


def test_triton_comes_before_cuda_and_cuda_serves_what_triton_cannot(built, monkeypatch):
    monkeypatch.setattr(dispatch.ops.load_backend("triton"), "availability", lambda: "triton is not installed")
    assert dispatch.choose("auto", *HALF) == "cuda"
    assert dispatch.ORDER.index("triton") < dispatch.ORDER.index("cuda")


def test_rows_that_begin_at_no_multiple_of_16_bytes_are_copied():
    wide = torch.randn(2, 3, 5, 65).half()
    dense = torch.randn(2, 3, 5, 64).half()
    cases = {
        "dense": (dense, True), "transposed": (dense.transpose(1, 2), True),
        "expanded": (dense[:1].expand(4, 3, 5, 64), True),
        "odd rows": (wide[..., :64], False), "shifted": (torch.randn(4, 72).half()[:, 1:65], False),
        "columns": (torch.randn(64, 4).half().T, False), "one row": (wide[:1, :1, :1, :64], True),
    }  # fmt: skip
    for name, (tensor, as_it_is) in cases.items():
        copy = cuda.aligned(tensor)
        assert (copy is tensor) == as_it_is, name
        assert torch.equal(copy, tensor), name
        assert copy.data_ptr() % 16 == 0, name


def test_a_backward_of_empty_tensors_launches_nothing():
    problem = testing.make_problem(Case(Tq=0, Tk=0, P=5, D=64))
    grad = torch.full_like(problem.sets[0].key, torch.nan)
    out = torch.empty_like(problem.query)
    wanted = Grads(None, None, None, ((grad, None),))
    cuda.run_backward(None, None, problem, out, out[..., 0], out, None, wanted)
    assert bool((grad == 0).all())


def test_every_set_with_ids_gets_a_plan():
    problem = testing.make_problem(Case(B=3, N=2, D=64, ids="random", num_sets=2))
    readable = cuda._readable(problem)
    assert all(s.plan is not None for s in readable.sets)
    assert cuda._readable(readable) is readable
    without = replace(problem, sets=())
    assert cuda._readable(without) is without


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("80,90", (80, 90)), ("9.0;8.0", (80, 90)), ("sm_89 sm_120", (89, 120)), ("", ()), ("none", ()), ("90,90", (90,))],
)
def test_architectures_are_read_in_every_usual_spelling(text, numbers):
    assert cuda_build.parse_architectures(text) == numbers


@pytest.mark.parametrize("text", ["75", "hopper", "80,x"])
def test_what_names_no_architecture_raises(text):
    with pytest.raises(ValueError, match="expected PREFIX_FAST_CUDA_ARCHS to name architectures from 80 on"):
        cuda_build.parse_architectures(text)


def test_without_the_variable_the_cards_in_the_machine_are_asked_for(monkeypatch):
    monkeypatch.delenv(cuda_build.VARIABLE, raising=False)
    monkeypatch.setattr(cuda_build, "visible_architectures", lambda: (86,))
    assert cuda_build.wanted_architectures() == (86,)
    monkeypatch.setenv(cuda_build.VARIABLE, "none")
    assert cuda_build.wanted_architectures() == ()


def test_an_object_is_compiled_anew_where_anything_that_it_is_made_of_differs(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path / "cache"))
    csrc = tmp_path / "csrc"
    (csrc / "cuda").mkdir(parents=True)
    for name in (*(f"{kernel}.cu" for kernel in cuda_build.KERNELS), "tiles.cuh", "call.h"):
        (csrc / "cuda" / name).write_text(name)

    def objects(version="13.0", architectures=(80,)):
        toolkit = cuda_build.Toolkit(Path("/usr/bin/nvcc"), version)
        lines = cuda_build.ninja_statements(toolkit, csrc, architectures, tmp_path, tmp_path / "module.so")
        return {line.split()[1] for line in lines if "cuda_kernel" in line}

    first = objects()
    assert len(first) == len(cuda_build.KERNELS) * len(cuda_build.TYPES)
    assert objects() == first
    assert not objects(version="13.1") & first
    assert not objects(architectures=(80, 90)) & first
    (csrc / "cuda" / "forward.cu").write_text("changed")
    assert len(objects() & first) == len(first) - len(cuda_build.TYPES)
    (csrc / "cuda" / "tiles.cuh").write_text("changed")
    assert not objects() & first


def test_build_cuda_compiles_into_the_package_for_the_architectures_asked_for(monkeypatch, tmp_path):
    built = []
    monkeypatch.setenv("PREFIX_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda_build, "build", lambda *arguments: built.append(arguments))
    target = cuda_build.install("90,80")
    assert built == [((80, 90), target.parent.parent / "csrc", tmp_path / "cuda" / "host", target)]
    assert target.parent == Path(cuda_build.__file__).parent
    assert target.name.startswith("_native_cuda.")


def test_build_cuda_without_architectures_or_a_card_raises(monkeypatch):
    monkeypatch.setattr(cuda_build, "wanted_architectures", lambda: ())
    with pytest.raises(ValueError, match="build-cuda: expected --archs, as in 80,90"):
        cuda_build.install()


def test_a_build_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_build, "find_toolkit", lambda: None)
    with pytest.raises(NotImplementedError, match="expected nvcc on PATH or in CUDA_HOME"):
        cuda_build.build((80,), tmp_path, tmp_path, tmp_path / "module.so")
    monkeypatch.setattr(cuda_build, "find_toolkit", lambda: cuda_build.Toolkit(Path("nvcc"), "13.0"))
    with pytest.raises(NotImplementedError, match="expected the kernels' sources in"):
        cuda_build.build((80,), tmp_path, tmp_path, tmp_path / "module.so")
