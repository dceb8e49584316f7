"""What starting costs: `import redraft` beside `import torch`, and the CPU time of `redraft sample` to its first token.

python benchmarks/start_up.py [--rounds 9] [--model PATH] [--against OLDER_CHECKOUT]

Whole processes in turns, medians. CPU time is user and system time of all threads of a process. The model is a random
one of 8 M parameters by default. `plain transformers` loads the same model and runs it once, without redraft: what it
takes is transformers' own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

HERE = Path(__file__).parents[1]
SAMPLE = """
import io, os, sys

class Clocked(io.TextIOWrapper):
    def write(self, text):
        if text.strip():
            times = os.times()
            os.write(1, f"{times.user + times.system}".encode())
            os._exit(0)
        return super().write(text)

sys.stdout = Clocked(sys.stdout.buffer)
from redraft.cli import main
sys.argv = ["redraft", "sample", sys.argv[1], "import os", "--max-new-tokens", "32", "--steps", "1"]
main()
"""
PLAIN = """
import os, sys
import torch, transformers
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    model(torch.zeros(1, 32, dtype=torch.long))
"""
CLOCK = """
import os
times = os.times()
os.write(1, f"{times.user + times.system}".encode())
os._exit(0)
"""


def seconds(code: str) -> float:
    """Run a Python process and time it."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def cpu_seconds(code: str, *arguments: str, checkout: Path = HERE) -> float:
    """Run code that prints its own CPU time, with the package of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, cwd=checkout, check=True, capture_output=True
    )
    return float(done.stdout)


def random_model(folder: str) -> str:
    """Save a random model of 8 M parameters with a tokenizer."""
    import torch

    from redraft.data.tokenizer import train_tokenizer
    from redraft.models.build import build_model
    from redraft.models.config import ModelConfig
    from redraft.models.settings import DiffusionSettings

    texts = [path.read_text(errors="replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))[:120]]
    tokenizer = train_tokenizer(texts, vocab_size=4096)
    torch.manual_seed(0)
    size = ModelConfig(size="hidden=288,layers=7,heads=6,intermediate=768")
    model = build_model(size, DiffusionSettings(mask_token_id=tokenizer.mask_token_id), tokenizer=tokenizer)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    """Measure in turns and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model")
    parser.add_argument("--against", type=Path, help="another checkout, whose `redraft sample` is measured too")
    args = parser.parse_args()
    print(describe(Path(__file__).name, sys.argv[1:]))
    with tempfile.TemporaryDirectory() as folder:
        first_tokens(args.model or random_model(folder), against=args.against, rounds=args.rounds)
    pairs = [(seconds("import torch"), seconds("import torch, redraft")) for _ in range(args.rounds + 1)][1:]
    print("| process | seconds |")
    print("|---|---|")
    print(f"| import torch | {statistics.median(torch for torch, _ in pairs):.2f} |")
    print(f"| import torch, redraft | {statistics.median(both for _, both in pairs):.2f} |")
    print(f"| ratio, median of pairs | {statistics.median(both / torch for torch, both in pairs):.3f} |")


def first_tokens(model: str, *, against: Path | None, rounds: int) -> None:
    """Print the CPU time of `redraft sample` to its first token, and of what it cannot do without."""
    processes = {
        "import torch": lambda: cpu_seconds("import torch" + CLOCK),
        "plain transformers: load, one forward": lambda: cpu_seconds(PLAIN + CLOCK, model),
        "redraft sample, to the first token": lambda: cpu_seconds(SAMPLE, model),
    }
    if against is not None:
        processes["the same, earlier checkout"] = lambda: cpu_seconds(SAMPLE, model, checkout=against.resolve())
    measured = [{name: run() for name, run in processes.items()} for _ in range(rounds + 1)][1:]
    print("| process | CPU seconds, median | least |")
    print("|---|---|---|")
    for name in processes:
        values = [one[name] for one in measured]
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} |")
    print()


if __name__ == "__main__":
    main()
