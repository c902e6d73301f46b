"""What ``import flowsde`` adds to ``import torch``: ``python -m benchmarks.import_time``."""

import os
import statistics
import subprocess
import sys

CODE = """
import time, sys
import torch
start = time.perf_counter()
import flowsde
print(time.perf_counter() - start)
heavy = ["torchdiffeq", "torchsde", "torchcde", "matplotlib", "sklearn", "accelerate"]
print([name for name in heavy if name in sys.modules])
"""


def main() -> None:
    # As installed: with the bytecode that the first import leaves behind.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", CODE]
    lines = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        .stdout.strip()
        .splitlines()
        for _ in range(7)
    ]
    added = statistics.median(float(line[0]) for line in lines)
    print(f"import flowsde adds {added:.3f} s to import torch; heavy modules loaded: {lines[0][1]}")


if __name__ == "__main__":
    main()
