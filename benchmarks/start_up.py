"""What `import redraft` costs beside `import torch`: whole processes in turns, medians.

python benchmarks/start_up.py [--rounds 9]
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import describe


def seconds(code: str) -> float:
    """Run a Python process and time it."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    pairs = [(seconds("import torch"), seconds("import torch, redraft")) for _ in range(args.rounds + 1)][1:]
    print(describe(Path(__file__).name, sys.argv[1:]))
    print("| process | seconds |")
    print("|---|---|")
    print(f"| import torch | {statistics.median(torch for torch, _ in pairs):.2f} |")
    print(f"| import torch, redraft | {statistics.median(both for _, both in pairs):.2f} |")
    print(f"| ratio, median of pairs | {statistics.median(both / torch for torch, both in pairs):.3f} |")


if __name__ == "__main__":
    main()
