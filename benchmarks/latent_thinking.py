"""Latent thinking beside baselines of the same width and depth: one table per task, over the seeds.

    python benchmarks/latent_thinking.py --task countdown --seeds 0 1 2 --runs runs/thinking.jsonl

latent: autoencoder (as its recipe), denoiser, then steps, guidance, blocks and the necessity controls; on countdown
rollout follows, all of it again, and what the answer decoder says. Baselines: AR that writes the thoughts out, AR with
as many pause tokens before its answer (where the answer is the thoughts themselves, before these), where it is not also
AR that answers at once, masked diffusion at several numbers of forwards. The task's verifier judges.

Models train for the steps of STEPS, chosen for about equal time on one core; the CPU minutes they took are printed.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from machine import describe
from outcome import whole
from rich.console import Console
from transformers import DynamicCache

import redraft
from redraft.errors import unknown_name
from redraft.evaluation.metrics import pass_at_k
from redraft.latent.stages import run_stage
from redraft.latent.tasks import TASKS, ThoughtTask, find_task, held_out_prompts
from redraft.latent.tasks.composition import Composition
from redraft.latent.thinking import Thinker
from redraft.latent.words import WrittenTask
from redraft.models.query import Query
from redraft.randomness import fold, uniform
from redraft.recipes import RECIPES
from redraft.training.run import run

ON_COUNTDOWN = {"latent": 2500, "rollout": 500, "AR": 1500, "masked diffusion": 1500}
STEPS = {
    "countdown": ON_COUNTDOWN,
    "composition": {"latent": 1500, "rollout": 0, "AR": 1500, "masked diffusion": 1500},
    "sudoku": {"latent": 1000, "rollout": 0, "AR": 1000, "masked diffusion": 1000},
    "sudoku-multi": {"latent": 1000, "rollout": 0, "AR": 1000, "masked diffusion": 1000},
}
"""Training of the latent denoiser, of its rollout, of AR and of masked diffusion."""
FILLS = (1, 2, 4, 8)
"""Forwards of masked diffusion, beside one for each token."""
QUIET = Console(quiet=True)


@dataclass
class Table:
    """Rows of one model and seed, measured on the same prompts."""

    task: ThoughtTask
    prompts: list[str]
    wanted: str = ""
    """A pattern: settings of thinking whose names it is not found in are left out."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    begun: float = field(default_factory=time.process_time)
    cpu_minutes: float = 0.0

    def trained(self) -> None:
        """Stop the clock of the training."""
        self.cpu_minutes = (time.process_time() - self.begun) / 60

    def add(self, name: str, texts: list[list[str]], *, forwards: int, seconds: float, **more: float) -> None:
        """Judge the answers of each prompt's samples."""
        found = [
            [text if self.task.is_solved(prompt, text) else None for text in told]
            for prompt, told in zip(self.prompts, texts, strict=True)
        ]
        hits = [sum(answer is not None for answer in answers) for answers in found]
        row = {
            "name": name,
            "one": 100 * sum(hits) / sum(map(len, found)),
            "any": 100 * sum(map(bool, hits)) / len(found),
            **{f"any_{k}": self._any_of(k, found, hits) for k in (2, 5)},
            "vote": 100
            * mean(Counter(told).most_common(1)[0][0] in right for told, right in zip(texts, found, strict=True)),
            "distinct": sum(len(set(answers) - {None}) for answers in found) / len(found),
            "seconds": seconds / sum(hits) if any(hits) else None,
            "forwards": forwards / sum(hits) if any(hits) else None,
            "cpu_minutes": self.cpu_minutes,
            **more,
        }
        lengths = [len(prompt.split()) for prompt in self.prompts]
        if isinstance(self.task, Composition):  # solved by number of permutations
            row["by_length"] = {
                length: 100 * sum(h for h, n in zip(hits, lengths, strict=True) if n == length)
                / sum(len(f) for f, n in zip(found, lengths, strict=True) if n == length)
                for length in sorted(set(lengths))
            }  # fmt: skip
        print(json.dumps(row), file=sys.stderr, flush=True)
        self.rows.append(row)

    @staticmethod
    def _any_of(k: int, found: list[list[Any]], hits: list[int]) -> float | None:
        if len(found[0]) <= k:
            return None
        return 100 * mean(pass_at_k(len(answers), h, k) for answers, h in zip(found, hits, strict=True))

    def think(
        self,
        name: str,
        thinker: Thinker,
        *,
        read: str = "thoughts",
        shown: Callable[[list[str]], list[str]] = lambda own: own,
        **settings: Any,
    ) -> None:
        """Measure one setting of the dials; `read`: judge what the thoughts say, or the answer decoder.

        Of answers is also measured how many say what the thoughts do that they were `shown`, given what each sample's
        own thoughts say.
        """
        if not re.search(self.wanted, name):
            return
        start = time.perf_counter()
        trains = thinker.think(self.prompts, **settings)
        seconds = time.perf_counter() - start
        flat = [sample for samples in trains for sample in samples]
        texts, more = [self.task.answer([thought.text for thought in sample.thoughts]) for sample in flat], {}
        if read == "answer":
            seen, texts = shown(texts), [sample.answer for sample in flat]
            more["follows"] = 100 * mean(a == b for a, b in zip(texts, seen, strict=True))
        told = [texts[i : i + len(trains[0])] for i in range(0, len(texts), len(trains[0]))]
        self.add(name, told, forwards=sum(s.forwards for s in flat), seconds=seconds, **more)


def trained_thinker(args: argparse.Namespace, folder: Path, seed: int) -> Thinker:
    """Train an autoencoder and a denoiser in their folders, with an answer decoder if wanted."""
    recipes = {name: RECIPES[f"latent-{name}"]() for name in ("autoencoder", "denoiser")}
    first = recipes["autoencoder"]
    first = replace(first, train=replace(first.train, seed=seed))
    if args.task == "composition":  # blocks of one token
        first = replace(first, autoencoder=replace(first.autoencoder, num_latents=1))
    whole(run_stage(replace(first, task=args.task, out=str(folder / "ae")), console=QUIET))
    train = replace(
        recipes["denoiser"].train, seed=seed, max_minutes=None, max_steps=args.steps, optimizer=args.optimizer
    )  # fmt: skip
    start, out = str(folder / "ae"), str(folder / "den")
    config = replace(recipes["denoiser"], task=args.task, out=out, start=start, train=train, force=args.force)
    config = replace(config, denoiser=replace(config.denoiser, num_layers=args.layers))
    config = replace(config, objective=replace(config.objective, times=args.times))
    if not args.has_answer:
        config = replace(config, objective=replace(config.objective, answer_weight=0.0))
    thinker = redraft.load_thinker(whole(run_stage(config, console=QUIET)).folder)
    size = sum(p.numel() for m in (thinker.denoiser, thinker.autoencoder) for p in m.parameters()) / 1e6
    print(f"latent: {size:.2f} M parameters with its autoencoder", file=sys.stderr)
    return thinker


def controls(table: Table, thinker: Thinker, prefix: str, *, read: str, samples: int) -> None:
    """Measure what is left where the committed thoughts are not one's own."""
    rows = torch.arange(len(table.prompts) * samples).view(-1, samples)
    swap = torch.cat([pair.flip(0) for pair in rows.split(2)]).flatten().tolist()
    sources = {"shuffled": rows.roll(1, 0).flatten().tolist(), "swapped in pairs": swap}
    settings = {"steps": 16, "num_samples": samples, "solver": "ddim", "read": read}
    zeroed = f"{prefix}, control: thoughts zeroed"
    table.think(zeroed, thinker, intervene=lambda block, z: torch.zeros_like(z), **settings)
    for name, of in sources.items():
        change = lambda block, z, of=of: z[of]  # noqa: E731
        shown = lambda own, of=of: [own[i] for i in of]  # noqa: E731
        table.think(f"{prefix}, control: thoughts {name}", thinker, intervene=change, shown=shown, **settings)
    if read == "answer":
        swap_trains(table, thinker, f"{prefix}, control: whole trains swapped in pairs", swap, settings)


def swap_trains(table: Table, thinker: Thinker, name: str, of: list[int], settings: dict[str, Any]) -> None:
    """Show each sample the thoughts of another, as they were when nobody intervened; its answer should say theirs."""
    if not re.search(table.wanted, name):
        return
    alone = {key: value for key, value in settings.items() if key != "read"}
    flat = [sample for samples in thinker.think(table.prompts, **alone) for sample in samples]
    thoughts = [[thought.latents for thought in flat[i].thoughts] for i in of]
    said = [table.task.answer([thought.text for thought in flat[i].thoughts]) for i in of]

    def change(block: int, z: Any) -> Any:
        pairs = zip(thoughts, z, strict=True)
        return torch.stack([train[block - 1] if block <= len(train) else own for train, own in pairs])

    table.think(name, thinker, intervene=change, shown=lambda _: said, **settings)


def latent(args: argparse.Namespace, table: Table, folder: Path, seed: int) -> None:
    """Train the stages, and turn the dials after the denoiser and after its rollout."""
    thinker = trained_thinker(args, folder, seed)
    table.trained()
    turn_dials(args, table, thinker, "latent")
    for blocks in () if isinstance(table.task, Composition) else range(1, min(thinker.denoiser.config.max_blocks, 5)):
        name = f"latent, 16 steps, {blocks} blocks"
        table.think(name, thinker, steps=16, blocks=blocks, num_samples=args.samples, solver="ddim")
    if not args.own_steps:
        return
    table.begun = time.process_time() - 60 * table.cpu_minutes
    recipe = RECIPES["latent-rollout"]()
    train = replace(
        recipe.train, seed=seed, max_minutes=None, max_steps=args.own_steps, optimizer=args.optimizer
    )  # fmt: skip
    recipe = replace(recipe, task=args.task, out=str(folder / "roll"), start=str(folder / "den"), train=train)
    recipe = replace(recipe, objective=replace(recipe.objective, times=args.times))
    thinker = redraft.load_thinker(whole(run_stage(recipe, console=QUIET)).folder)
    table.trained()
    turn_dials(args, table, thinker, "latent + rollout")
    if not args.has_answer:
        return
    settings = {"steps": 16, "num_samples": args.samples, "solver": "ddim", "read": "answer"}
    table.think("latent + rollout, answer, 16 steps", thinker, **settings)
    table.think("latent + rollout, answer, 16 steps, cfg 2", thinker, cfg_scale=1.0, **settings)
    controls(table, thinker, "latent + rollout, answer, 16 steps", read="answer", samples=args.samples)


def turn_dials(args: argparse.Namespace, table: Table, thinker: Thinker, name: str) -> None:
    """Measure what the thoughts say by steps and guidance, and the necessity controls."""
    settings = {"num_samples": args.samples, "solver": "ddim"}
    for steps in (1, 2, 4, 8, 16, 32):
        table.think(f"{name}, {steps} steps", thinker, steps=steps, **settings)
    table.think(f"{name}, 16 steps, cfg 2", thinker, steps=16, cfg_scale=1.0, **settings)
    table.think(f"{name}, 16 steps, cfg 2, noise 0.6", thinker, steps=16, cfg_scale=1.0, init_noise=0.6, **settings)
    table.think(f"{name}, 16 steps, noise 1.3", thinker, steps=16, init_noise=1.3, **settings)
    table.think(f"{name}, 16 steps, dpm++2m", thinker, steps=16, num_samples=args.samples)
    controls(table, thinker, f"{name}, 16 steps", read="thoughts", samples=args.samples)


@torch.no_grad()
def decode(lm, ids, first, *, temperature, seed, fills=None):
    """Fill columns first[row] ... of every row: left to right, or surest first where it is no autoregressive model."""

    def draw(logits, row, step, position):
        """Draw tokens (n,), each by numbers of its own."""
        if not temperature:
            return logits.argmax(-1)
        u = uniform(fold(seed, row)[:, None], step, position[:, None], torch.arange(logits.shape[-1])).clamp(min=1e-12)
        return (logits / temperature - (-u.log()).log().float()).argmax(-1)

    if lm.denoiser.settings.is_autoregressive:
        return write_rows(lm, ids.clone(), first, draw=draw)
    return fill_masked(lm, ids.clone(), first, fills=fills, draw=draw)


def write_rows(lm, ids, first, *, draw):
    """Write from left to right, keys and values kept; the rows' prompts may end at different columns."""
    model, pad = lm.model, lm.tokenizer.pad_token_id
    rows, begin, width = torch.arange(len(ids)), int(first.min()), ids.shape[1]
    cache, fed = DynamicCache(config=model.config), 0
    for column in range(begin, width):
        logits = model(input_ids=ids[:, fed:column], past_key_values=cache, use_cache=True).logits[:, -1].float()
        logits[:, pad] = -torch.inf
        fed = column
        drawn = draw(logits, rows, (column - first)[:, None], torch.full_like(rows, column - 1))
        ids[:, column] = torch.where(column < first, ids[:, column], drawn)
    return ids, len(ids) * (width - begin)


def fill_masked(lm, ids, first, *, fills, draw):
    """Decide the surest open places, as many in each forward."""
    mask_token_id = lm.denoiser.settings.mask_token_id
    is_behind = torch.arange(ids.shape[1]) >= first[:, None]
    segments = (ids != lm.tokenizer.pad_token_id).long()
    longest = int(segments.sum(1).sub(first).max())
    forwards = min(fills or longest, longest)
    for step in range(forwards):
        is_open = (ids == mask_token_id) & is_behind
        row, position = is_open.nonzero(as_tuple=True)
        query = Query(input_ids=ids, where=is_open.flatten().nonzero()[:, 0], segment_ids=segments)
        logits = lm.denoiser(query).float()
        logits[:, mask_token_id] = -torch.inf
        drawn, sure = ids.clone(), torch.full(ids.shape, -1.0)
        drawn[row, position] = found = draw(logits, row, step, position)
        sure[row, position] = logits.softmax(-1).gather(-1, found[:, None])[:, 0]
        quota = (is_open.sum(1) / (forwards - step)).round()
        is_chosen = is_open & (sure.argsort(1, descending=True).argsort(1) < quota[:, None])
        ids = torch.where(is_chosen, drawn, ids)
    return ids, len(ids) * forwards


def baselines(task: ThoughtTask) -> dict[str, tuple[str, str]]:
    """Say which token models a task is compared with: recipe, and the form of the rows behind the name of the task."""
    found = {
        "AR, thoughts written": ("thought-ar", ""),
        "AR, pause tokens": ("thought-ar", ":pause"),
        "masked diffusion": ("thought-masked", ""),
    }
    if isinstance(task, Composition):  # each thought as far from its factor in every row, as in the latent model
        found["AR, thoughts written behind a padded prompt"] = ("thought-ar", ":padded")
    if any(e.answer != " ".join(e.blocks) for e in islice(task.examples(), 100)):
        found["AR, answer at once"] = ("thought-ar", ":direct")
    return found


def baseline(args: argparse.Namespace, table: Table, folder: Path, seed: int, *, name: str) -> None:
    """Train a token model, and measure it greedily and at temperature 1."""
    recipe, form = baselines(table.task)[name]
    config = RECIPES[recipe]()
    train = replace(
        config.train, seed=seed, max_steps=args.steps, optimizer=args.optimizer, max_validation_windows=1
    )  # fmt: skip
    data, model = (
        replace(config.data, source=f"{args.task}{form}"),
        replace(config.model, size=f"{config.model.size},layers={args.layers}"),
    )
    whole(run(replace(config, out=str(folder), data=data, model=model, train=train), console=QUIET))
    table.trained()
    is_filled = config.objective.kind == "masked"
    lm, written = redraft.load(folder, device="cpu"), WrittenTask.from_source(data.source, fills_answer=is_filled)
    eos, mask = lm.eos_token_ids[0], lm.denoiser.settings.mask_token_id
    starts = [lm.encode(written.given(prompt)).tolist() for prompt in table.prompts]
    width = max(len(before) + len(after) for before, after in written.rows)
    hole = [mask] * written.longest_target if is_filled else []
    dials = [(0.0, 1, None), (1.0, args.samples, None)]
    if is_filled:
        dials = [(0.0, 1, fills) for fills in FILLS] + dials[:1] + [(1.0, args.samples, FILLS[-1])] + dials[1:]
    for temperature, samples, fills in dials:
        start = time.perf_counter()
        rows = [ids for ids in starts for _ in range(samples)]
        blank = [ids + hole + [lm.tokenizer.pad_token_id] * (width - len(ids) - len(hole)) for ids in rows]
        first = torch.tensor([len(ids) for ids in rows])
        done, forwards = decode(lm, torch.tensor(blank), first, temperature=temperature, seed=seed, fills=fills)
        seconds = time.perf_counter() - start
        texts = [row[f:].tolist() for row, f in zip(done, first.tolist(), strict=True)]
        texts = [lm.decode(torch.tensor(t[: t.index(eos)] if eos in t else t)) for t in texts]
        answers = [written.answer(text) for text in texts]
        told = [answers[i * samples : (i + 1) * samples] for i in range(len(table.prompts))]
        counted = f", {fills} forwards" if fills else ""
        table.add(f"{name}{counted}, T = {temperature:g}", told, forwards=forwards, seconds=seconds)


def measured(args: argparse.Namespace, table: Table, seed: int, group: str) -> list[dict[str, Any]]:
    """Return the rows of a model and seed: from --runs where they are there, else by training it."""
    args.steps = args.max_steps or STEPS[args.task][group.split(",")[0]]
    args.own_steps = STEPS[args.task]["rollout"] if args.rollout_steps is None else args.rollout_steps
    if group != "latent":
        args.own_steps = 0
    args.has_answer = args.own_steps > 0 and not args.no_answer  # only rollout needs one
    steps = f"{args.steps}+{args.own_steps}" if args.own_steps else args.steps
    mute = ["no-answer"] if args.own_steps and args.no_answer else []
    muon = ["muon"] if args.optimizer == "muon" else []
    own = []
    if group == "latent":
        own = [*([args.times] if args.times != "logit-normal" else []), *([table.wanted] if table.wanted else [])]
    settings = (args.task, steps, *mute, *muon, args.layers, args.samples, len(table.prompts), seed, group, *own)
    key = " ".join(map(str, settings))
    if args.runs and args.runs.is_file():
        done = {run["key"]: run["rows"] for run in map(json.loads, args.runs.read_text().splitlines())}
        if key in done:
            return done[key]
    model = latent if group == "latent" else partial(baseline, name=group)
    with tempfile.TemporaryDirectory() as folder:
        model(args, table, Path(folder), seed)
    table.rows = [row | {"group": row["name"].split(",")[0] if group == "latent" else group} for row in table.rows]
    if args.runs:
        args.runs.parent.mkdir(parents=True, exist_ok=True)
        made = describe("latent_thinking.py", sys.argv[1:])
        with args.runs.open("a") as file:
            file.write(json.dumps({"key": key, "rows": table.rows, "made": made.strip()}) + "\n")
    return table.rows


def show(runs: dict[int, list[dict[str, Any]]]) -> None:
    """Print mean and, of several seeds, standard deviation of every row; then what depends on the length."""
    names = [row["name"] for row in next(iter(runs.values()))]
    rows = {name: [row for found in runs.values() for row in found if row["name"] == name] for name in names}

    def cell(found: list[dict[str, Any]], column: str, digits: int) -> str:
        values = [row[column] for row in found if row[column] is not None]
        if not values:
            return "-"
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    print("Solved by one sample, any of 2, 5 and K, the commonest of K (%); distinct; seconds, forwards per solution.")
    print("\n| | one | any of 2 | of 5 | of K | vote of K | distinct | seconds | forwards |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, found in rows.items():
        columns = {"one": 1, "any_2": 1, "any_5": 1, "any": 1, "vote": 1, "distinct": 2, "seconds": 3, "forwards": 0}
        print(f"| {name} | {' | '.join(cell(found, column, digits) for column, digits in columns.items())} |")
    trained = {found[0]["group"]: found for found in rows.values()}
    print("\nCPU minutes of training:", "; ".join(f"{name} {cell(f, 'cpu_minutes', 1)}" for name, f in trained.items()))
    if answered := {name: found for name, found in rows.items() if "follows" in found[0]}:
        print("\nAnswers that say what the thoughts do that they were shown, %:", end=" ")
        print("; ".join(f"{name} {cell(found, 'follows', 1)}" for name, found in answered.items()))
    lengths = list(rows[names[0]][0].get("by_length", {}))
    if lengths:
        print(f"\nsolved, one sample, by number of permutations:\n\n| | {' | '.join(map(str, lengths))} |")
        print(f"|---|{'---|' * len(lengths)}")
        for name, found in rows.items():
            told = [f"{mean(row['by_length'][length] for row in found):.0f}" for length in lengths]
            print(f"| {name} | {' | '.join(told)} |")


def draw(runs: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """Plot what one sample solves against steps or forwards; of compositions, against the number of permutations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4))
    axes = figure.add_subplot(ylabel="solved by one sample, %", ylim=(0, 103))
    found = _curves([row for rows in runs.values() for row in rows])
    for name, points in found.items():
        spreads = [stdev(values) if len(values) > 1 else 0.0 for values in points.values()]
        means = [mean(values) for values in points.values()]
        if list(points) == [0]:  # a token a forward: a level to compare with
            axes.axhline(means[0], linestyle="--", color=f"C{len(axes.lines)}", label=name)
        else:
            axes.errorbar(list(points), means, spreads, fmt=".-", capsize=2, label=name)
    is_by_length = "by_length" in next(iter(runs.values()))[0]
    axes.set_xlabel("permutations" if is_by_length else "denoising steps of a block, or forwards")
    axes.set_xscale("linear" if is_by_length else "log")
    ticks = sorted({place for points in found.values() for place in points if place})
    axes.set_xticks(ticks, ticks)
    axes.set_xticks([], minor=True)
    axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight")


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """Sort results by line and place; 0 is for token models at a token a forward."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if "by_length" in row:
            if re.fullmatch(r"AR.*T = 0|masked diffusion, T = 0|latent, (1|16) steps", row["name"]):
                for length, share in row["by_length"].items():
                    found.setdefault(row["name"], {}).setdefault(int(length), []).append(share)
            continue
        steps = re.fullmatch(r"(latent.*|masked diffusion), (\d+) (?:steps|forwards)(?:, T = 0)?", row["name"])
        if steps and "answer" not in row["name"]:
            found.setdefault(steps[1], {}).setdefault(int(steps[2]), []).append(row["one"])
        elif row["name"].endswith("T = 1") and "forwards" not in row["name"]:
            found.setdefault(row["name"], {}).setdefault(0, []).append(row["one"])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="countdown", choices=TASKS)
    parser.add_argument("--max-steps", type=int, help=f"of each model but the rollout; by default {STEPS}")
    parser.add_argument("--rollout-steps", type=int, help="0 leaves rollout out; by default as above")
    parser.add_argument("--no-answer", action="store_true", help="latent without an answer decoder: thoughts alone")
    parser.add_argument("--times", default="logit-normal", help="of the latent model, or uniform")
    parser.add_argument("--optimizer", default="muon", choices=("adamw", "muon"), help="of all but the autoencoder")
    parser.add_argument("--layers", type=int, default=4, help="2 for composition: fewer than its thoughts")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--force", action="store_true", help="go on with an autoencoder that fails its gate")
    parser.add_argument("--models", nargs="+", default=None, help="only these, by the names that begin their rows")
    parser.add_argument("--rows", default="", help="only settings of thinking whose names match this pattern")
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--runs", type=Path, default=None, help=".jsonl that keeps finished models; they are not rerun")
    args = parser.parse_args()
    task = find_task(args.task)
    held_out = held_out_prompts(task)
    prompts = held_out[:: max(1, len(held_out) // args.prompts)][: args.prompts]
    groups = ["latent", *baselines(task)]
    for name in args.models or []:
        if name not in groups:
            raise unknown_name("model", name, groups)
    runs: dict[int, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        chosen = [group for group in groups if group in (args.models or groups)]
        found = [row for group in chosen for row in measured(args, Table(task, prompts, args.rows), seed, group)]
        runs[seed] = json.loads(json.dumps(found))  # as the file has it: keys are strings
    print(describe("latent_thinking.py", sys.argv[1:]))
    print(f"seeds {', '.join(map(str, args.seeds))}; {len(prompts)} held-out prompts; K = {args.samples}\n")
    show(runs)
    if args.plot:
        draw(runs, args.plot)


if __name__ == "__main__":
    main()
