"""Planning: solve rate against forwards, of autoregression in two orders and masked diffusion, on 4x4 sudoku.

    python benchmarks/planning.py [--seeds 0 1 2] [--steps 2000] [--plot docs/planning.svg]

Models of one shape are trained for equal steps on the same puzzles, with the loss on the answer only; the learning rate
of each is chosen from the same two, on held-out puzzles that are not those of the table. All decode greedily.
AR, as written: cell by cell in reading order. AR, friendly: the empty cells as "name digit", that with the fewest
candidates first. MDLM: reading order; surest tokens first. Countdown is compared in `benchmarks/latent_thinking.py`.

Finished runs are kept in a file and not repeated; the head of the table says where and at which commit they were made.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from machine import describe
from outcome import whole
from rich.console import Console

import redraft
from redraft.data.config import ChatConfig, DataConfig
from redraft.data.sources import split_of
from redraft.latent.encode import word_tokenizer
from redraft.latent.tasks import WorkedExample, find_task
from redraft.models.config import ModelConfig
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.run import run

METHODS = ("AR, as written", "AR, friendly", "MDLM")
TASK = "sudoku"
TUNING_PUZZLES = 100
TEMPLATE = "{% for m in messages %}{{ m.content }} {{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
NAMES = [f"{row}{column}" for row in "abcd" for column in "1234"]


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


def written(method: str, example: WorkedExample) -> str:
    """Write the answer in the method's order."""
    if method != "AR, friendly":
        return example.answer
    cells = example.answer.split()
    return " ".join(f"{NAMES[i]} {cells[i]}" for i in empties_in_order(example.prompt, example.answer))


def restored(method: str, prompt: str, text: str) -> str:
    """Undo `written`, as far as the text allows it."""
    if method != "AR, friendly":
        return text
    words = text.split()
    filled = dict(zip(words[::2], words[1::2], strict=False))
    return " ".join(filled.get(n, "_") if clue == "_" else clue for n, clue in zip(NAMES, prompt.split()))  # noqa: B905


def puzzles_of(method: str, *, count: int) -> tuple[list[WorkedExample], list[str], list[str]]:
    """Split by the hash of the prompts: examples to learn, prompts for tuning, prompts for the table."""
    task, held_out, train = find_task(TASK), [], []
    for example in task.examples():
        if split_of(example.prompt, validation_fraction=task.held_out) == "train":
            train.append(replace(example, answer=written(method, example)))
        else:
            held_out.append(example.prompt)
    prompts = list(dict.fromkeys(held_out))
    tuning = prompts[:: len(prompts) // TUNING_PUZZLES]
    test = [prompt for prompt in prompts if prompt not in tuning]
    return train, tuning[:TUNING_PUZZLES], test[:: max(1, len(test) // count)][:count]


def train(args: Any, method: str, examples: list[WorkedExample], *, rate: float, seed: int) -> tuple:
    """Train a model; return it, the tokens of an answer with its end, and the mean training loss in nats per token."""
    lengths = [len(e.prompt.split()) for e in examples], [len(e.answer.split()) + 1 for e in examples]
    seq_len, steps = max(map(sum, zip(*lengths, strict=True))), args.steps
    with tempfile.TemporaryDirectory() as work:
        lines = (json.dumps({"prompt": e.prompt, "response": e.answer}) for e in examples)
        (Path(work) / "train.jsonl").write_text("\n".join(lines))
        (Path(work) / "template").write_text(TEMPLATE)
        word_tokenizer(examples).save_pretrained(f"{work}/tokenizer")
        chat = ChatConfig(batching="grouped", eos_block=seq_len, template=f"{work}/template")
        config = RunConfig(
            out=f"{work}/run",
            data=DataConfig(
                source=f"{work}/train.jsonl", kind="chat", chat=chat, seq_len=seq_len, validation_fraction=0.0,
                tokenizer=f"{work}/tokenizer",
            ),
            model=ModelConfig(size="1m,heads=4", max_positions=64),
            objective=ObjectiveConfig(kind="masked" if method == "MDLM" else "ar"),
            train=TrainConfig(
                learning_rate=rate, batch_size=args.batch_size, max_steps=steps, weight_decay=0.01, seed=seed,
                save_every=steps, precision="float32", compile="off",
            ),
        )  # fmt: skip
        folder = whole(run(config, console=Console(quiet=True))).folder
        loss = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["train_loss"]
        return redraft.load(folder, device="cpu"), max(lengths[1]), loss


def train_and_solve(args: Any, method: str, *, rate: float, seed: int) -> dict[str, object]:
    """Train once; count what is solved of the tuning and the test puzzles, for every number of steps."""
    begun, (examples, *held_out) = time.monotonic(), puzzles_of(method, count=args.puzzles)
    lm, length, loss = train(args, method, examples, rate=rate, seed=seed)
    most = [*(steps for steps in (1, 2, 4, 8, 16) if steps < length), length]
    settings, rows = [{"steps": steps} for steps in most] if method == "MDLM" else [{}], []
    for setting in settings:
        solved = []
        for prompts in held_out:
            ids = [lm.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
            told = lm.generate(ids, max_new_tokens=length, temperature=0.0, **setting)
            answers = [restored(method, p, t) for p, t in zip(prompts, told.texts, strict=True)]
            solved.append(sum(map(find_task(TASK).is_solved, prompts, answers)))
        counts = {"tuning": solved[0], "solved": solved[1], "puzzles": len(held_out[1])}
        rows.append({"forwards": statistics.mean(told.forwards), **counts})
    seconds = round(time.monotonic() - begun)
    return {"parameters": lm.model.num_parameters(), "loss": loss, "seconds": seconds, "rows": rows}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Trains, and remembers every run in a file of JSON lines."""

    args: argparse.Namespace
    used: list[str] = field(default_factory=list)
    """Where the runs of this table were made, without repetition."""

    def __call__(self, method: str, *, rate: float, seed: int) -> dict:
        """Return the run of these settings."""
        sizes = (self.args.steps, self.args.batch_size, self.args.puzzles)
        key, path = f"{TASK} | {method} | {rate:g} | {seed} | {sizes}", self.args.runs
        known = {r["key"]: r for r in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
        if key not in known:
            made = describe(Path(__file__).name, sys.argv[1:]).strip()
            known[key] = {"key": key, **train_and_solve(self.args, method, rate=rate, seed=seed), "made": made}
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
            print(known[key], file=sys.stderr)
        if known[key]["made"] not in self.used:
            self.used.append(known[key]["made"])
        return known[key]


def measure(runs: Runs, method: str) -> list[tuple[float, list[float], float]]:
    """Choose the rate, run every seed, print the rows; return forwards, each seed's solve rate, standard error."""
    first = runs.args.seeds[0]
    tried = {rate: runs(method, rate=rate, seed=first)["rows"][-1]["tuning"] for rate in runs.args.rates}
    rate = max(tried, key=tried.__getitem__)
    finals, points = [runs(method, rate=rate, seed=seed) for seed in runs.args.seeds], []
    for rows in zip(*(final["rows"] for final in finals), strict=True):
        solved, count = [100 * row["solved"] / row["puzzles"] for row in rows], rows[0]["puzzles"]
        mean, forwards = statistics.mean(solved), statistics.mean(row["forwards"] for row in rows)
        error = (mean * (100 - mean) / count) ** 0.5
        spread, each = f"{statistics.stdev(solved):.1f}" if solved[1:] else "-", ", ".join(f"{x:.1f}" for x in solved)
        print(f"| {method} | {rate:g} | {forwards:.1f} | {each} | {mean:.1f} | {error:.1f} | {spread} |")
        points.append((forwards, solved, error))
    return points


def draw(methods: dict[str, list[tuple[float, list[float], float]]], path: Path) -> None:
    """Plot the solve rate against the forwards, with standard errors over the puzzles and every seed as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="forwards per puzzle", ylabel="held-out puzzles solved, %", xscale="log")
    for (method, points), style in zip(methods.items(), ("s", "D", "o-"), strict=False):
        x, y = [p[0] for p in points], [statistics.mean(p[1]) for p in points]
        drawn = axes.errorbar(x, y, yerr=[p[2] for p in points], fmt=style, capsize=3, label=method)
        for forwards, solved, _ in points:
            axes.plot([forwards] * len(solved), solved, ".", color=drawn[0].get_color(), alpha=0.5)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one also chooses the rate")
    parser.add_argument("--steps", type=int, default=1200, help="training of each model")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates to choose from")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--puzzles", type=int, default=300)
    parser.add_argument("--runs", type=Path, default=Path("runs/planning.jsonl"), help="finished runs")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    runs = Runs(args=args)
    print("| method | rate | forwards | solved, %, each seed | mean | se over puzzles | sd over seeds |")
    print("|---|---|---|---|---|---|---|")
    found = {method: measure(runs, method) for method in args.methods}
    print("\n" + "\n".join(runs.used))
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
