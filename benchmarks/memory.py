"""Peak memory of training steps or of a generation, each contender in a process of its own: `peak_memory`.

As a script it is that process: `memory.py NAME step|generation [--quick]` prints the peak resident set in bytes.
"""

import resource
import subprocess
import sys
from pathlib import Path


def peak_memory(name: str, work: str, quick: bool) -> int:
    """The largest resident set, in bytes, of a fresh process that does the work with the named contender."""
    command = [sys.executable, __file__, name, work, *(["--quick"] if quick else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_resident_set() -> int:
    """The largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux starts that of a new program at the peak of the process that forked it.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(name: str, work: str, quick: bool) -> None:
    """Three steps, or one generation, then the peak."""
    from hosts import MANY_ROWS, QUICK_GENERATION, QUICK_STEP, STEP, Generation, TrainingStep

    if work == "generation":
        Generation(name, QUICK_GENERATION if quick else MANY_ROWS)()
    else:
        step = TrainingStep(name, QUICK_STEP if quick else STEP)
        for _ in range(3):
            step()
    print(peak_resident_set())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--quick" in sys.argv[3:])
