"""Peak memory of training steps or of a generation, each contender in a process of its own: `peak_memory`.

As a script it is that process: `memory.py NAME step|long-step|generation [--quick]` prints the resident set in bytes,
of the model before it has worked and at its peak.
"""

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

# glibc keeps blocks below a size that grows with those that are freed, and PyTorch's aligned ones do not fit into their
# own gaps. With this size fixed, what is freed goes back to the system.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def peak_memory(name: str, work: str, quick: bool) -> int:
    """The largest resident set, in bytes, of a fresh process that does the work with the named contender."""
    return _run(name, work, quick, {})[1]


def work_memory(name: str, work: str, quick: bool, environment: dict[str, str]) -> int:
    """How much the resident set of that process, in bytes, grows over what model and libraries take at rest."""
    rest, peak = _run(name, work, quick, environment)
    return peak - rest


def _run(name: str, work: str, quick: bool, environment: dict[str, str]) -> tuple[int, int]:
    command = [sys.executable, __file__, name, work, *(["--quick"] if quick else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    rest, peak = done.stdout.split()[-2:]
    return int(rest), int(peak)


def resident_set(peak: bool) -> int:
    """The resident set of this process in bytes, now or the largest so far; elsewhere than on Linux the largest."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux starts that of a new program at the peak of the process that forked it.
        field = "VmHWM:" if peak else "VmRSS:"
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(name: str, work: str, quick: bool) -> None:
    """Three steps, or one generation, with the resident set before and at its peak."""
    from hosts import LONG_STEP, MANY_ROWS, QUICK_GENERATION, QUICK_STEP, STEP, Generation, TrainingStep

    if work == "generation":
        run, times = Generation(name, QUICK_GENERATION if quick else MANY_ROWS), 1
    else:
        size = LONG_STEP if work == "long-step" else STEP
        run, times = TrainingStep(name, QUICK_STEP if quick else size), 3
    gc.collect()
    rest = resident_set(peak=False)
    for _ in range(times):
        run()
    print(rest, resident_set(peak=True))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--quick" in sys.argv[3:])
