"""The examples run as their first lines say, and what they train learns something."""

import os
import re
import subprocess
import sys

import pytest

EXPECTED = {
    "peft_script": r"PEFT's own loss with the saved file: \d",
    "trainer": r"adapter_model\.safetensors \d+ KB",
    "hand_written_gpt": "in 30 steps",
    "many_users": r"None: '",
    "bart": "in 30 steps",
    "shared_sources": r"48 rows of 16 sources: \d+ tokens computed instead of \d+",
    "rollouts": r"reward \d\.\d+ -> \d\.\d+, 8 completions of each of 4 prompts",
    "dpo": r"1\d of 16 answers are preferred more",
    "accelerate_processes": "2 processes, the same prefix in each: True",
}
NEEDS = {"peft_script": "peft", "trainer": "accelerate", "accelerate_processes": "accelerate"}


def run(root, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONSAFEPATH"] = ""  # an example finds its neighbour beside itself
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXPECTED)
def test_example_runs_and_learns(name, root):
    pytest.importorskip(NEEDS.get(name, "torch"))
    # With -m and without -P the working directory would be on sys.path: there `kernels` is another package.
    processes = ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = run(root, *(processes if "processes" in name else []), f"examples/{name}.py")
    first, last = map(float, re.search(r"loss (\d+\.\d+) -> (\d+\.\d+) in 30 steps", printed).groups())
    assert last < 0.95 * first
    assert re.search(EXPECTED[name], printed)


def test_every_example_is_run(root):
    files = {file.stem for file in (root / "examples").glob("*.py")} - {"common"}
    assert files == set(EXPECTED)
