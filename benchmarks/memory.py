"""Peak memory of training steps, each contender in a process of its own: `peak_memory(name, quick)`.

As a script it is that process: `memory.py NAME [--quick]` prints the peak resident set in bytes.
"""

import resource
import subprocess
import sys


def peak_memory(name: str, quick: bool) -> int:
    """The largest resident set, in bytes, of a fresh process that takes three steps with the named contender."""
    command = [sys.executable, __file__, name, *(["--quick"] if quick else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main(name: str, quick: bool) -> None:
    """Three steps, then the peak."""
    from hosts import QUICK_STEP, STEP, TrainingStep

    step = TrainingStep(name, QUICK_STEP if quick else STEP)
    for _ in range(3):
        step()
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    main(sys.argv[1], "--quick" in sys.argv[2:])
