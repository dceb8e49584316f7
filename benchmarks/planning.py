"""Planning: solve rate against forwards, of autoregression in two orders and masked diffusion, on puzzles.

    python benchmarks/planning.py [--tasks sudoku countdown] [--seeds 0 1] [--steps 2000] [--plot docs/planning.svg]

Models of one shape are trained for equal steps on the same puzzles, with the loss on the answer only; a learning rate is
chosen for each from the same two, on held-out puzzles that are not those of the table. All decode greedily.
AR, as written: sudoku cell by cell in reading order; countdown's last step before its first, so the end is committed to
before the way. AR, friendly: sudoku's empty cells as "name digit", that with the fewest candidates first; countdown's
steps in the order in which they are carried out. MDLM: reading order and carried-out order; surest tokens first.

Finished runs are kept in a file and not repeated; the head of the table says where and at which commit they were made.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from machine import describe
from rich.console import Console

import redraft
from redraft.data.chat import ChatConfig
from redraft.data.prepare import DataConfig
from redraft.data.splits import split_of
from redraft.data.tasks import Example, find_task, word_tokenizer
from redraft.models.build import ModelConfig
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.run import run

METHODS = ("AR, as written", "AR, friendly", "MDLM")
STEPS = {"sudoku": 450, "countdown": 200}
LEARNING_RATES = (1e-3, 3e-3)
TUNING_PUZZLES = 100
TEMPLATE = "{% for m in messages %}{{ m.content }} {{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
NAMES = [f"{row}{column}" for row in "abcd" for column in "1234"]


@dataclass(frozen=True, kw_only=True)
class Puzzles:
    """What one method learns and is asked."""

    train: list[Example]
    tuning: list[str]
    test: list[str]
    is_solved: Callable[[str, str], bool]
    """Of a prompt and what the model wrote."""


def empties_in_order(prompt: str, grid: str) -> list[int]:
    """Order sudoku's empty cells: always one with the fewest digits left by its row, column and box."""
    cells, solution, order = prompt.split(), grid.split(), []
    while "_" in cells:
        left = {i: len(set("1234") - {cells[j] for j in _peers(i)}) for i in range(16) if cells[i] == "_"}
        order.append(min(left, key=left.__getitem__))
        cells[order[-1]] = solution[order[-1]]
    return order


def _peers(i: int) -> list[int]:
    """The cells of a cell's row, column and box."""
    return [j for j in range(16) if i // 4 == j // 4 or i % 4 == j % 4 or (i // 8, i % 4 // 2) == (j // 8, j % 4 // 2)]


def written(task: str, method: str, example: Example) -> str:
    """Write the answer in the method's order."""
    if task == "sudoku" and method == "AR, friendly":
        cells = example.answer.split()
        return " ".join(f"{NAMES[i]} {cells[i]}" for i in empties_in_order(example.prompt, example.answer))
    if task == "countdown" and method == "AR, as written":
        return " ".join(reversed(example.blocks))
    return example.answer


def restored(task: str, method: str, prompt: str, text: str) -> str:
    """Undo `written`, as far as the text allows it."""
    words = text.split()
    if task == "sudoku" and method == "AR, friendly":
        filled = dict(zip(words[::2], words[1::2], strict=False))
        return " ".join(filled.get(n, "_") if clue == "_" else clue for n, clue in zip(NAMES, prompt.split()))  # noqa: B905
    if task == "countdown" and method == "AR, as written":
        return " ".join(words[4:] + words[:4])
    return text


def puzzles_of(name: str, method: str, *, count: int) -> Puzzles:
    """Split the puzzles by the hash of their prompts."""
    task, held_out, train = find_task(name), [], []
    for example in task.examples():
        if split_of(example.prompt, validation_fraction=task.held_out) == "train":
            train.append(replace(example, answer=written(name, method, example)))
        else:
            held_out.append(example.prompt)
    prompts = list(dict.fromkeys(held_out))
    tuning, rest = prompts[:: len(prompts) // TUNING_PUZZLES], set(prompts[:: len(prompts) // TUNING_PUZZLES])
    test = [prompt for prompt in prompts if prompt not in rest]
    test = test[:: max(1, len(test) // count)][:count]
    solved = lambda prompt, text: task.is_solved(prompt, restored(name, method, prompt, text))  # noqa: E731
    return Puzzles(train=train, tuning=tuning[:TUNING_PUZZLES], test=test, is_solved=solved)


def train_and_solve(args: argparse.Namespace, task: str, method: str, *, rate: float, seed: int) -> dict[str, object]:
    """Train once; count what is solved of the tuning and the test puzzles, for every number of steps."""
    begun, steps = time.monotonic(), args.steps or STEPS[task]
    puzzles = puzzles_of(task, method, count=args.puzzles)
    tokenizer = word_tokenizer(puzzles.train)
    lengths = [len(e.prompt.split()) for e in puzzles.train], [len(e.answer.split()) + 1 for e in puzzles.train]
    seq_len, num_new = max(map(sum, zip(*lengths, strict=True))), max(lengths[1])
    with tempfile.TemporaryDirectory() as work:
        lines = (json.dumps({"prompt": e.prompt, "response": e.answer}) for e in puzzles.train)
        (Path(work) / "train.jsonl").write_text("\n".join(lines))
        (Path(work) / "template").write_text(TEMPLATE)
        tokenizer.save_pretrained(f"{work}/tokenizer")
        chat = ChatConfig(batching="grouped", eos="to-block-end", block_size=seq_len, template=f"{work}/template")
        config = RunConfig(
            out=f"{work}/run",
            data=DataConfig(
                source=f"{work}/train.jsonl", kind="chat", chat=chat, seq_len=seq_len, validation_fraction=0.0,
                tokenizer=f"{work}/tokenizer", cache_dir=f"{work}/cache",
            ),
            model=ModelConfig(size="1m", num_heads=4, max_positions=64),
            objective=ObjectiveConfig(kind="masked" if method == "MDLM" else "ar"),
            train=TrainConfig(
                learning_rate=rate, batch_size=args.batch_size, max_steps=steps, weight_decay=0.01, seed=seed,
                eval_every=0, save_every=steps, precision=args.precision, compile="off", device="cpu",
                report_to=(), log_every=50,
            ),
        )  # fmt: skip
        outcome = run(config, console=Console(quiet=True))
        last = json.loads((outcome.folder / "log.jsonl").read_text().splitlines()[-1])
        trained, lm = time.monotonic() - begun, redraft.load(outcome.folder, device="cpu")
    counts = [s for s in (1, 2, 4, 8, 16) if s < num_new] + [num_new] if method == "MDLM" else [None]
    size = sum(p.numel() for p in lm.model.parameters())
    found = {"parameters": size, "last log": last, "train seconds": round(trained), "rows": []}
    for count in counts:
        solved, forwards = [], []
        for prompts in (puzzles.tuning, puzzles.test):
            ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
            told = lm.generate(ids, max_new_tokens=num_new, temperature=0.0, **({"steps": count} if count else {}))
            solved.append([puzzles.is_solved(p, t) for p, t in zip(prompts, told.texts, strict=True)])
            forwards = told.forwards
        found["rows"].append(
            {"forwards": statistics.mean(forwards), "tuning": sum(solved[0]), "solved": sum(solved[1]),
             "puzzles": len(solved[1])}
        )  # fmt: skip
    return found | {"seconds": round(time.monotonic() - begun)}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Trains, and remembers every run in a file of JSON lines."""

    args: argparse.Namespace
    used: list[str] = field(default_factory=list)
    """Where the runs of this table were made, without repetition."""

    def __call__(self, task: str, method: str, *, rate: float, seed: int) -> dict:
        """Return the run of these settings."""
        sizes = (self.args.steps or STEPS[task], self.args.batch_size, self.args.puzzles)
        key, path = f"{task} | {method} | {rate:g} | {seed} | {sizes}", self.args.runs
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        known = {line["key"]: line for line in lines}
        if key not in known:
            made = describe(Path(__file__).name, sys.argv[1:]).strip()
            found = train_and_solve(self.args, task, method, rate=rate, seed=seed)
            known[key] = {"key": key, **found, "made": made}
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
            print(known[key], file=sys.stderr)
        if known[key]["made"] not in self.used:
            self.used.append(known[key]["made"])
        return known[key]


def measure(runs: Runs, task: str, method: str) -> list[tuple[float, list[float], float]]:
    """Choose the rate, run every seed, print the rows; return forwards, each seed's solve rate, standard error."""
    first = runs.args.seeds[0]
    tried = {rate: runs(task, method, rate=rate, seed=first)["rows"][-1]["tuning"] for rate in LEARNING_RATES}
    rate = max(tried, key=tried.__getitem__)
    finals, points = [runs(task, method, rate=rate, seed=seed) for seed in runs.args.seeds], []
    for rows in zip(*(final["rows"] for final in finals), strict=True):
        solved, count = [100 * row["solved"] / row["puzzles"] for row in rows], rows[0]["puzzles"]
        mean = statistics.mean(solved)
        error = (mean * (100 - mean) / count) ** 0.5
        forwards = statistics.mean(row["forwards"] for row in rows)
        spread = f"{statistics.stdev(solved):.1f}" if len(solved) > 1 else "-"
        each = ", ".join(f"{value:.1f}" for value in solved)
        print(f"| {task} | {method} | {rate:g} | {forwards:.1f} | {each} | {mean:.1f} | {error:.1f} | {spread} |")
        points.append((forwards, solved, error))
    return points


def draw(found: dict[str, dict[str, list[tuple[float, list[float], float]]]], path: Path) -> None:
    """Plot the solve rate against the forwards, with standard errors over the puzzles and every seed as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    for axes, (task, methods) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        axes.set(title=task, xlabel="forwards per puzzle", ylabel="held-out puzzles solved, %", xscale="log")
        for (method, points), style in zip(methods.items(), ("s", "D", "o-"), strict=False):
            x, y = [p[0] for p in points], [statistics.mean(p[1]) for p in points]
            drawn = axes.errorbar(x, y, yerr=[p[2] for p in points], fmt=style, capsize=3, label=method)
            for forwards, solved, _ in points:
                axes.plot([forwards] * len(solved), solved, ".", color=drawn[0].get_color(), alpha=0.5)
        axes.legend()
    figure.savefig(path)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="the first one also chooses the rate")
    parser.add_argument("--steps", type=int, help=f"training of each model, by default {STEPS}")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--puzzles", type=int, default=300)
    parser.add_argument("--precision", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--runs", type=Path, default=Path("runs/planning.jsonl"), help="finished runs")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    runs = Runs(args=args)
    print("| task | method | rate | forwards | solved, %, each seed | mean | se over puzzles | sd over seeds |")
    print("|---|---|---|---|---|---|---|---|")
    found = {task: {method: measure(runs, task, method) for method in METHODS} for task in args.tasks}
    print("\n" + "\n".join(runs.used))
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
