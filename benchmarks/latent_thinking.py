"""Latent thinking beside baselines of the same width, depth and minutes: one table per task and seed.

    python benchmarks/latent_thinking.py --task countdown --minutes 20 --seeds 0 1 2

Latent rows: autoencoder (1000 steps), denoiser (--minutes), then steps, guidance, blocks and the necessity controls.
Baselines: AR that writes the thoughts out, AR that answers at once, AR with pause tokens in the thoughts' place (both
only where the answer is not the thoughts themselves), masked diffusion. The task's verifier says what is solved.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import redraft
from redraft.data.splits import split_of
from redraft.data.tasks import find_task
from redraft.layouts import Layout, attention_mask
from redraft.processes.masked import MaskedDiffusion
from redraft.randomness import fold, uniform
from redraft.recipes import RECIPES
from redraft.training.latent import Rows, Stage, run_stage, stage_trainer
from redraft.training.run import drive

IGNORED = -100


def report(name, found, *, forwards, seconds):
    """Print one row: `found` holds, for each prompt, the accepted answers among its K samples (None where refused)."""
    samples = sum(map(len, found))
    hits = sum(answer is not None for answers in found for answer in answers)
    anyone = sum(any(answer is not None for answer in answers) for answers in found) / len(found)
    distinct = sum(len(set(answers) - {None}) for answers in found) / len(found)
    per_hit = f"{seconds / hits:.3f} | {forwards / hits:.0f}" if hits else "- | -"
    print(f"| {name} | {100 * hits / samples:.1f} | {100 * anyone:.1f} | {distinct:.2f} | {per_hit} |", flush=True)


def think(name, thinker, task, prompts, **settings):
    """Measure one setting of the dials."""
    start = time.perf_counter()
    trains = thinker.think(prompts, **settings)
    seconds = time.perf_counter() - start
    texts = [[s.answer or task.answer([t.text for t in s.thoughts]) for s in samples] for samples in trains]
    found = [[t if task.is_solved(p, t) else None for t in told] for p, told in zip(prompts, texts, strict=True)]
    report(name, found, forwards=sum(s.forwards for samples in trains for s in samples), seconds=seconds)


def latent_rows(args, task, prompts, folder, seed):
    """Train the stages and sweep the dials."""
    recipes = {name: RECIPES[f"latent-{name}"]() for name in ("autoencoder", "denoiser")}
    quiet = Console(quiet=True)
    base = replace(recipes["autoencoder"].train, seed=seed)
    run_stage(replace(recipes["autoencoder"], task=args.task, out=str(folder / "ae"), train=base), console=quiet)
    train = replace(recipes["denoiser"].train, seed=seed, max_minutes=args.minutes, max_steps=args.max_steps)
    config = replace(
        recipes["denoiser"], task=args.task, out=str(folder / "den"), start=str(folder / "ae"), train=train
    )
    config = replace(config, denoiser=replace(config.denoiser, num_layers=args.layers), force=args.force)
    if args.task != "composition":  # there the answer is the thoughts, written out
        config = replace(config, objective=replace(config.objective, answer_weight=0.0))
    thinker = redraft.load_thinker(run_stage(config, console=quiet).folder)
    size = sum(p.numel() for m in (thinker.denoiser, thinker.autoencoder) for p in m.parameters()) / 1e6
    print(f"latent: {size:.2f} M parameters with its autoencoder", file=sys.stderr)
    for steps in (1, 2, 4, 8, 16, 32):
        think(f"latent, {steps} steps", thinker, task, prompts, steps=steps, samples=args.samples, solver="ddim")
    think("latent, 16 steps, cfg 2", thinker, task, prompts, steps=16, samples=args.samples, cfg=2.0, solver="ddim")
    for blocks in range(1, thinker.denoiser.config.max_blocks):
        think(
            f"latent, 16 steps, at most {blocks} blocks",
            thinker,
            task,
            prompts,
            steps=16,
            samples=args.samples,
            blocks=blocks,
        )
    swap = torch.arange(len(prompts) * args.samples).view(-1, args.samples)
    swap = torch.cat([pair.flip(0) for pair in swap.split(2)]).flatten()
    controls = {
        "thoughts zeroed": lambda block, z: torch.zeros_like(z),
        "thoughts shuffled": lambda block, z: z.roll(args.samples, 0),
        "thoughts swapped in pairs": lambda block, z: z[swap],
    }
    for name, change in controls.items():
        think(
            f"control: {name}", thinker, task, prompts, steps=16, samples=args.samples, solver="ddim", intervene=change
        )


def train_baseline(args, seed, ids, labels, tokenizer, *, mask_token_id, folder):
    """Train a stock Llama on token rows: causal, or as masked diffusion where a mask token is given."""
    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id
    config = LlamaConfig(
        vocab_size=int(ids.max()) + 1, hidden_size=128, intermediate_size=512, num_hidden_layers=args.layers,
        num_attention_heads=4, tie_word_embeddings=True, max_position_embeddings=ids.shape[1], pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if mask_token_id is not None:
        config.is_causal = False

    def losses(wrapped, batch, step, part):
        ids, labels, mask = batch["ids"], batch["labels"], visible(batch["ids"], pad=pad, causal=mask_token_id is None)
        if mask_token_id is None:
            logits = wrapped(input_ids=ids, attention_mask=mask).logits[:, :-1]
            return {"loss": F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)}
        process, rows = MaskedDiffusion(mask_token_id=mask_token_id), part.rows[:, None]
        t = uniform(seed, step, 0, rows)[:, 0].clamp(min=1e-3)
        u = uniform(seed, step, 1, rows, torch.arange(ids.shape[1]))
        noised = process.corrupt(ids, t, u=u, can_change=labels != IGNORED)
        where = noised.targets()
        logits = wrapped(input_ids=noised.x_t, attention_mask=mask).logits.flatten(0, 1)[where]
        return {"loss": process.loss(logits, noised.flatten()[where]).sum() / (labels != IGNORED).sum()}

    recipe = RECIPES["latent-denoiser"]()
    train = replace(recipe.train, seed=seed, max_minutes=args.minutes, max_steps=args.max_steps, ema_decay=None)
    stage = Stage(
        model=model, rows=Rows(ids=ids, labels=labels), losses=losses, tokenizer=tokenizer, finish=lambda _: None
    )
    config = replace(recipe, out=str(folder), train=train)
    drive(config, stage_trainer(config, stage), tokenizer=tokenizer, checkpoint=None, console=Console(quiet=True))
    return model.eval()


def visible(ids, *, pad, causal):
    """Mask of a row: no padding, and nothing that comes later where it is causal."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return attention_mask(Layout(block_size=1 if causal else None), positions, segment_ids=(ids != pad).long())


@torch.no_grad()
def decode(model, ids, first, *, pad, mask_token_id, temperature, seed):
    """Fill columns first[row] ... of every row: left to right, or surest first. Returns ids and forwards."""
    ids, rows = ids.clone(), torch.arange(len(ids))
    for step in range(ids.shape[1] - int(first.min())):
        logits = model(input_ids=ids, attention_mask=visible(ids, pad=pad, causal=mask_token_id is None)).logits.float()
        logits[..., :1] = -torch.inf if mask_token_id is None else logits[..., :1]
        if temperature:
            u = uniform(
                fold(seed, rows)[:, None, None],
                step,
                torch.arange(ids.shape[1])[:, None],
                torch.arange(logits.shape[-1]),
            )
            logits = logits / temperature - (-u.clamp(min=1e-12).log()).log().float()
        if mask_token_id is None:
            at = (first + step).clamp(max=ids.shape[1] - 1)
            drawn = logits[rows, at - 1].argmax(-1)
        else:
            logits[..., mask_token_id] = -torch.inf
            sure = logits.softmax(-1).amax(-1).masked_fill(ids != mask_token_id, -1)
            at = sure.argmax(1)
            drawn = torch.where(ids[rows, at] == mask_token_id, logits[rows, at].argmax(-1), ids[rows, at])
        ids[rows, at] = drawn
    return ids, len(ids) * (ids.shape[1] - int(first.min()))


def baseline_rows(args, task, prompts, folder, seed, tokenizer):
    """Train and measure the token models."""
    examples = [e for e in task.examples() if split_of(e.prompt, validation_fraction=task.held_out) == "train"]
    pad, eos, mask = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    says_more = any(task.answer(list(e.blocks)) != " ".join(e.blocks) for e in examples[:100])
    written = {"AR, thoughts written": lambda e: [*encode(" ".join(e.blocks)), eos], "masked diffusion": None}
    if says_more:
        written["AR, answer at once"] = lambda e: [*encode(e.answer), eos]
        written["AR, pause tokens"] = lambda e: [*[mask] * len(encode(" ".join(e.blocks))), *encode(e.answer), eos]
    for name, target in written.items():
        is_masked, target = target is None, target or written["AR, thoughts written"]
        pairs = [(encode(e.prompt), target(e)) for e in examples]
        width = max(len(p) + len(t) for p, t in pairs)
        filler, hidden = (eos, mask) if is_masked else (pad, None)
        ids = torch.tensor([p + t + [filler] * (width - len(p) - len(t)) for p, t in pairs])
        labels = torch.tensor(
            [[IGNORED] * len(p) + t + [eos if is_masked else IGNORED] * (width - len(p) - len(t)) for p, t in pairs]
        )
        model = train_baseline(
            args, seed, ids, labels, tokenizer, mask_token_id=hidden, folder=folder / name,
        )  # fmt: skip
        for temperature, samples in ((0.0, 1), (1.0, args.samples)):
            start = time.perf_counter()
            starts = [encode(p) for p in prompts for _ in range(samples)]
            first = torch.tensor([len(p) for p in starts])
            blank = torch.tensor([p + [mask if is_masked else eos] * (width - len(p)) for p in starts])
            done, forwards = decode(
                model, blank, first, pad=pad, mask_token_id=hidden, temperature=temperature, seed=seed
            )  # fmt: skip
            seconds = time.perf_counter() - start
            texts = [row[f:].tolist() for row, f in zip(done, first.tolist(), strict=True)]
            texts = [tokenizer.decode(t[: t.index(eos)] if eos in t else t, skip_special_tokens=True) for t in texts]
            if (says_more and "written" in name) or (says_more and is_masked):
                texts = [task.answer(t.split()) for t in texts]
            found = [
                [t if task.is_solved(p, t) else None for t in texts[i * samples : (i + 1) * samples]]
                for i, p in enumerate(prompts)
            ]
            report(f"{name}, T = {temperature:g}", found, forwards=forwards, seconds=seconds)


def main():
    """Print the table of every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="countdown")
    parser.add_argument("--minutes", type=float, default=20.0, help="training of each model")
    parser.add_argument("--max-steps", type=int, default=6000)
    parser.add_argument("--layers", type=int, default=4, help="2 for composition: fewer than its thoughts")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--force", action="store_true", help="go on with an autoencoder that fails its gate")
    parser.add_argument("--skip", choices=["latent", "baselines"], default=None)
    args = parser.parse_args()
    task = find_task(args.task)
    held_out = {
        e.prompt: None for e in task.examples() if split_of(e.prompt, validation_fraction=task.held_out) == "validation"
    }
    prompts = list(held_out)[:: max(1, len(held_out) // args.prompts)][: args.prompts]
    print(describe("latent_thinking.py", sys.argv[1:]))
    for seed in args.seeds:
        print(f"\nseed {seed}, {len(prompts)} held-out prompts, K = {args.samples}\n")
        print("| | solved, one sample % | any of K % | distinct | seconds per solution | forwards per solution |")
        print("|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            if args.skip != "latent":
                latent_rows(args, task, prompts, Path(folder), seed)
            if args.skip != "baselines":
                from redraft.data.tasks import word_tokenizer

                baseline_rows(args, task, prompts, Path(folder), seed, word_tokenizer(list(task.examples())))


if __name__ == "__main__":
    main()
