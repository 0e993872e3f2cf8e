"""Answer one question in this process: write a line of JSON for each result to a file, then what ended it.

Started by `benchmarks.gpu.asking`, as python -m benchmarks.gpu.answer MODULE:FUNCTION DEVICE SIZE FILE.
"""

from __future__ import annotations

import json
import sys
import traceback
from pkgutil import resolve_name

from benchmarks.gpu.environment import gpu_environment
from benchmarks.gpu.setting import Setting


def main() -> None:
    """Answer the question of the command line."""
    function, device, size, file = sys.argv[1:]
    with open(file, "w") as lines:

        def write(kind: str, value: object) -> None:
            print(json.dumps({kind: value}), file=lines, flush=True)

        try:
            write("environment", gpu_environment())
            for result in resolve_name(function)(Setting(device, size)):
                write("result", result)
            write("end", "answered")
        except Exception:
            write("error", traceback.format_exc())
            raise


if __name__ == "__main__":
    main()
