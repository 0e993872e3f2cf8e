"""Run a command; write how long it took and the most memory that it held.

    python -I -S benchmarks/jobs/launch.py RESULT.json OUTPUT.txt COMMAND...

A process of its own, small, because Linux counts the memory of the process that starts a command as the command's:
started from a benchmark that has imported torch, no command would seem to need less than that.
"""

import json
import os
import subprocess
import sys
import time


def main() -> None:
    """Run it; end as it ends."""
    result, output, *command = sys.argv[1:]
    with open(output, "wb") as file:
        started, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - clock
    with open(result, "w") as file:
        json.dump({"started": started, "seconds": seconds, "peak_mib": used.ru_maxrss / 1024}, file)
    sys.exit(os.waitstatus_to_exitcode(status) != 0)


if __name__ == "__main__":
    main()
