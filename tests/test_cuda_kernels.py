"""The CUDA kernels, run by the emulator with every check on, against the float64 truth; and wrong kernels, all seen."""

from dataclasses import replace

import cuda_mutants
import pytest
import torch
from cuda_cases import ALL_HEAD_DIMS, DTYPES, HEAD_DIMS, call_of, check, check_conflicts, check_order, load
from cuda_compile import kernels_module, unavailable
from random_calls import CORNERS, KINDS, rare_kinds

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "runs")

# Random calls of `make test`, by type of products; 25 are a test.
QUICK = {"fp16": 200, "bf16": 100, "fp32": 125, "tf32": 75}
SAMPLE = (3, 7, 12, 26, 42)  # of cuda_mutants.MUTANTS
MANY = 600  # of each type in `make test-all`


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def quick_chunks():
    return [(products, first) for products, count in QUICK.items() for first in range(0, count, 25)]


def many_chunks():
    return [(products, first) for products, count in QUICK.items() for first in range(count, MANY, 25)]


@pytest.mark.parametrize(("products", "first"), quick_chunks())
def test_random_calls_agree_with_the_oracle(products, first):
    library = load(kernels_module(products, HEAD_DIMS))
    for seed in range(first, first + 25):
        check(call_of(seed, products), library, products)


@pytest.mark.parametrize("products", ["fp16", "bf16"])
def test_calls_with_a_short_prefix_run_the_fused_backward_and_agree_with_the_oracle(products):
    library = load(kernels_module(products, HEAD_DIMS))
    calls = [call for seed in range(600) if cuda_mutants.takes_short(call := call_of(seed, products))]
    ran = [check(call, library, products).split() for call in calls[:20]]
    assert sum("short" in names for names in ran) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(("products", "first"), many_chunks())
def test_many_random_calls_agree_with_the_oracle(products, first):
    library = load(kernels_module(products, ALL_HEAD_DIMS))
    for seed in range(first, first + 25):
        check(call_of(seed, products, ALL_HEAD_DIMS), library, products)


def test_random_calls_have_every_argument_often():
    calls = [call_of(seed, products) for products, count in QUICK.items() for seed in range(count)]
    assert rare_kinds(calls, KINDS, least=8) == []
    assert len(calls) >= 500


@pytest.mark.parametrize("products", DTYPES)
def test_corner_cases_agree_with_the_oracle(products):
    library = load(kernels_module(products, HEAD_DIMS))
    for call in CORNERS:
        if products != "tf32" or call.scores == "normal":
            check(replace(call, case=replace(call.case, dtype=DTYPES[products])), library, products)


@pytest.mark.parametrize("products", DTYPES)
def test_results_have_the_same_bits_in_any_order_of_threads_and_blocks(products):
    library = load(kernels_module(products, HEAD_DIMS))
    for seed in range(300, 308):
        check_order(call_of(seed, products), library, products)


@pytest.mark.parametrize("products", DTYPES)
def test_loops_of_products_have_no_bank_conflicts(products):
    library = load(kernels_module(products, HEAD_DIMS))
    for seed in range(320, 328):
        check_conflicts(call_of(seed, products), library, products)


def test_wrong_kernels_follow_the_sources(tmp_path):
    assert len(cuda_mutants.MUTANTS) >= 20
    for number, mutant in enumerate(cuda_mutants.MUTANTS):
        cuda_mutants.sources_of(mutant, tmp_path / str(number))


@pytest.mark.parametrize("number", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow)
                                    for n in range(len(cuda_mutants.MUTANTS))])  # fmt: skip
def test_wrong_kernel_is_seen_by_its_check(number):
    mutant = cuda_mutants.MUTANTS[number]
    name, text = cuda_mutants.killer(mutant)
    assert name in cuda_mutants.named(mutant), text or "no check has seen it"
