"""Latent thinking on real prose: paragraphs of the standard library's docstrings, a block of thought for each piece.

    python benchmarks/latent_prose.py --runs runs/prose --plot docs/latent-prose.svg

1. Autoencoders of several shapes on held-out blocks: tokens right, blocks exact, BLEU, by relative noise on latents.
2. A denoiser on the one named by --base: BLEU of its one-step estimate of x_0 against t, given the true blocks before
   (area under it: AuBLEU, arXiv 2306.02531), beside z_t decoded as it is, the best linear estimate
   alpha z_t / (alpha^2 + sigma^2), and the denoiser given another row's prompt and blocks.
3. Generation beside a stock Llama of the same width and depth with a cache: tokens per CPU second and samples; the
   Llama's nats per token of either's texts.

BLEU is sacrebleu's, of all blocks together. Finished models stay in --runs and are not trained again.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe
from outcome import whole
from prose import Prose
from rich.console import Console
from sacrebleu import corpus_bleu
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from redraft.data.tasks import Encoded, encode
from redraft.latent.autoencoder import NOISE_LEVELS, TextAutoencoder
from redraft.latent.checkpoint import load_autoencoder, load_thinker
from redraft.latent.objective import prompt_tokens
from redraft.latent.sequence import Latents, ThoughtBatch
from redraft.latent.thinking import Thinker
from redraft.layouts import two_copy_mask
from redraft.recipes import RECIPES
from redraft.training.config import TrainConfig
from redraft.training.latent import run_stage, thought_rows
from redraft.training.latent_config import AutoencoderShape
from redraft.training.latent_stage import Rows, Stage, stage_trainer
from redraft.training.run import drive

SHAPES = {
    "chunk-4x32": AutoencoderShape(kind="chunk", num_latents=4, latent_dim=32, hidden_size=256),
    "chunk-8x32": AutoencoderShape(kind="chunk", num_latents=8, latent_dim=32, hidden_size=256),
    "thought-8x32": AutoencoderShape(kind="thought", num_latents=8, latent_dim=32, hidden_size=128, num_layers=2),
}
TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
IGNORED = -100


def trained(name: str, args: argparse.Namespace, train: Callable[[Path], Any]) -> Path:
    """Train a model unless its folder is there; its cost is kept beside it."""
    folder = args.runs / name.replace(" ", "-")
    cost = folder / "cpu-minutes"
    if not cost.exists():
        start = time.process_time()
        train(folder)
        cost.write_text(f"{(time.process_time() - start) / 60:.1f}")
    print(f"{name}: {cost.read_text()} CPU minutes of training", file=sys.stderr, flush=True)
    return folder


def train_autoencoder(name: str, args: argparse.Namespace) -> Callable[[Path], Any]:
    """Train an autoencoder on every paragraph cut in several ways."""
    recipe = RECIPES["latent-autoencoder"]()
    steps = args.thought_steps if SHAPES[name].kind == "thought" else args.chunk_steps
    train = replace(recipe.train, max_steps=steps, batch_size=256, precision="bfloat16", save_every=10**9)
    task = Prose(starts=tuple(range(2, 12, 2)))
    config = replace(recipe, autoencoder=SHAPES[name], train=train)
    return lambda folder: whole(run_stage(replace(config, out=str(folder)), task=task, console=quiet()))


def train_denoiser(args: argparse.Namespace) -> Callable[[Path], Any]:
    """Train a denoiser without an answer decoder: the paragraph is its thoughts."""
    recipe = RECIPES["latent-denoiser"]()
    start = str(args.runs / args.base.replace(" ", "-"))
    config = replace(
        recipe, start=start, force=True, train=model_training(recipe.train, args, ema_decay=0.99),
        objective=replace(recipe.objective, answer_weight=0.0),
    )  # fmt: skip
    return lambda folder: whole(run_stage(replace(config, out=str(folder)), task=Prose(), console=quiet()))


def model_training(train: TrainConfig, args: argparse.Namespace, **settings: Any) -> TrainConfig:
    """Steps, rows and precision of both generators."""
    common = {"batch_size": 64, "max_steps": args.steps, "max_minutes": None, "precision": "bfloat16"}
    return replace(train, **common, **settings, save_every=10**9)


def quiet() -> Console:
    """Tell of the training on standard error."""
    return Console(stderr=True)


def llama_rows(encoded: Encoded, eos: int) -> Tensor:
    """Lay out [padded prompt | blocks | end], padded with id 0; the prompt's padding is at its start, and seen."""
    width = encoded.prompts.shape[1]
    rows = torch.zeros(len(encoded.prompts), width + encoded.blocks[0].numel() + 1, dtype=torch.int64)
    for row, prompt, kept, blocks, is_token in zip(
        rows, encoded.prompts, encoded.is_prompt, encoded.blocks, encoded.is_block_token, strict=True
    ):
        text = blocks[is_token]
        row[width - int(kept.sum()) : width] = prompt[kept]
        row[width : width + len(text) + 1] = torch.cat([text, torch.tensor([eos])])
    return rows


def nats(model: Any, ids: Tensor, width: int) -> Tensor:
    """Return the mean negative log-likelihood of what follows the prompts, in nats per token."""
    labels = torch.where(ids > 0, ids, IGNORED)[:, width:]
    logits = model(input_ids=ids, use_cache=False).logits[:, width - 1 : -1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def train_llama(train: Encoded, tokenizer: Any, args: argparse.Namespace) -> Callable[[Path], Any]:
    """Train a stock Llama of the denoiser's width and depth."""
    ids, width = llama_rows(train, tokenizer.eos_token_id), train.prompts.shape[1]

    def run(folder: Path) -> None:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=ids.shape[1],
                tie_word_embeddings=True,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        stage = Stage(
            model=model, rows=Rows(ids=ids), tokenizer=tokenizer,
            losses=lambda wrapped, batch, step, part: {"loss": nats(wrapped, batch["ids"], width)},
        )  # fmt: skip
        recipe = RECIPES["latent-denoiser"]()
        config = replace(recipe, out=str(folder), train=model_training(recipe.train, args, ema_decay=None))
        whole(drive(config, stage_trainer(config, stage), tokenizer=tokenizer, checkpoint=None, console=quiet()))
        model.save_pretrained(folder)

    return run


def bleu(task: Prose, tokenizer: Any, ids: Tensor, truth: Tensor) -> float:
    """Return the corpus BLEU of blocks of token ids, their padding left out."""
    written, wanted = (
        [task.text(" ".join(tokenizer.convert_ids_to_tokens(row.tolist(), skip_special_tokens=True))) for row in rows]
        for rows in (ids, truth)
    )
    return float(corpus_bleu(written, [wanted]).score)


def new_blocks(train: Encoded, held_out: Encoded) -> tuple[Tensor, Tensor]:
    """Return the held-out blocks that are no blocks of the training data, and which of their tokens are real."""
    known = set(map(tuple, train.real_blocks()[0].tolist()))
    ids, mask = held_out.real_blocks()
    is_new = torch.tensor([tuple(row) not in known for row in ids.tolist()])
    return ids[is_new], mask[is_new]


def first_rows(encoded: Encoded, count: int) -> Encoded:
    """Take the first examples."""
    return Encoded(**{f.name: getattr(encoded, f.name)[:count] for f in fields(Encoded)})


@torch.no_grad()
def show_autoencoder(name: str, model: TextAutoencoder, task: Prose, tokenizer: Any, ids: Tensor, mask: Tensor) -> None:
    """Print tokens right, blocks exact and BLEU at every level of noise."""
    latents = model.encode_normalized(ids, mask)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    for level in NOISE_LEVELS:
        found = model.decode(latents + level * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)))
        right = 100 * float((found == ids)[mask].float().mean())
        exact = 100 * float((found == ids).all(1).float().mean())
        score = bleu(task, tokenizer, found, ids)
        print(f"| {name} ({size:.1f} M) | {level:g} | {right:.1f} | {exact:.1f} | {score:.1f} |", flush=True)


@torch.no_grad()
def one_step(thinker: Thinker, batch: ThoughtBatch, z_t: Tensor, t: float, *, shift: int) -> Tensor:
    """Estimate every block in one pass, given the clean ones before it, or prompt and blocks `shift` rows away."""
    model, (rows, count, size) = thinker.denoiser, z_t.shape[:3]
    never = torch.zeros(rows, dtype=torch.bool)
    tokens, is_seen = prompt_tokens(batch.prompt.roll(shift, 0), never, batch.is_prompt.roll(shift, 0))
    clean, num_clean = batch.blocks.roll(shift, 0).flatten(1, 2), batch.num_blocks.roll(shift, 0)
    number = torch.arange(1, count + 1)
    block = number.repeat_interleave(size).repeat(2).expand(rows, -1)
    copy = torch.arange(2).repeat_interleave(count * size).expand(rows, -1)
    real = [number <= n[:, None] for n in (num_clean, batch.num_blocks)]
    is_valid = torch.cat([is_seen, torch.cat(real, 1).repeat_interleave(size, 1)], 1)
    noisy = z_t.flatten(1, 2)
    latents = Latents(
        z_t=torch.cat([clean, noisy], 1), x_0=torch.cat([clean, torch.zeros_like(noisy)], 1), t=t * copy,
        positions=model.config.latent_positions(number.repeat(2)).flatten().expand(rows, -1),
    )  # fmt: skip
    in_prompt = torch.zeros_like(tokens.ids)
    mask = two_copy_mask(torch.cat([in_prompt, block], 1), torch.cat([in_prompt, copy], 1), is_valid=is_valid)
    out = model.out(model(tokens, latents, mask).latents[:, count * size :])
    return model.config.process.predict_x_0(out, noisy, torch.full(noisy.shape[:2], t)).view(z_t.shape)


def denoising(thinker: Thinker, held_out: Encoded, task: Prose) -> dict[str, list[float]]:
    """Return BLEU at every time of TIMES, by estimator."""
    rows = thought_rows(thinker.autoencoder, held_out, with_answer=False)
    batch = ThoughtBatch(**rows[list(range(len(rows)))])
    is_real = torch.arange(batch.blocks.shape[1]) < batch.num_blocks[:, None]
    scores: dict[str, list[float]] = {}
    for t in TIMES:
        eps = torch.randn(batch.blocks.shape, generator=torch.Generator().manual_seed(0))
        z_t, alpha = (1 - t) * batch.blocks + t * eps, 1 - t  # the recipe's schedule is flow
        estimates = {
            "z_t as it is": z_t,
            "linear": alpha * z_t / (alpha**2 + t**2),
            "denoiser": one_step(thinker, batch, z_t, t, shift=0),
            "denoiser, another's context": one_step(thinker, batch, z_t, t, shift=1),
        }
        for name, x_0 in estimates.items():
            ids = thinker.autoencoder.decode(x_0[is_real])
            scores.setdefault(name, []).append(bleu(task, thinker.tokenizer, ids, held_out.blocks[is_real]))
    return scores


def show_denoising(scores: dict[str, list[float]], plot: Path | None) -> None:
    """Print BLEU against t with the area under it (its mean over t), and draw it."""
    print(f"| BLEU at t = | {' | '.join(map(str, TIMES))} | area |\n|---|{'---|' * (len(TIMES) + 1)}")
    for name, found in scores.items():
        area = float(torch.trapezoid(torch.tensor(found), torch.tensor(TIMES))) / (TIMES[-1] - TIMES[0])
        print(f"| {name} | {' | '.join(f'{score:.1f}' for score in found)} | {area:.1f} |")
    if plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="t", ylabel="BLEU of the decoded estimate", ylim=(0, 100))
        for name, found in scores.items():
            axes.plot(TIMES, found, "o-", markersize=3, label=name)
        axes.legend()
        figure.savefig(plot)


@torch.no_grad()
def write(model: Any, prompts: Tensor, *, count: int, seed: int = 0) -> Tensor:
    """Sample `count` tokens at temperature 1 with a cache of keys and values."""
    generator, ids, cache, found = torch.Generator().manual_seed(seed), prompts, None, []
    for _ in range(count):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = output.past_key_values, output.logits[:, -1].softmax(-1).multinomial(1, generator=generator)
        found.append(ids)
    return torch.cat(found, 1)


def show_speed(thinker: Thinker, model: Any, held_out: Encoded, repeats: int) -> None:
    """Print tokens per CPU second: medians of interleaved runs. Padding is no token; the Llama never stops early."""
    left, texts = llama_rows(held_out, 1)[:, : held_out.prompts.shape[1]], [e.prompt for e in held_out.examples]
    count = held_out.blocks[0].numel()
    dials = {"force_blocks": True, "solver": "ddim"}
    print("| batch | | tokens per CPU second | x Llama |\n|---|---|---|---|")
    for size in (1, 32):

        def think(steps: int, size: int = size) -> int:
            found = thinker.think(texts[:size], steps=steps, **dials)
            return sum(len(thought.text.split()) for samples in found for thought in samples[0].thoughts)

        methods = {
            "Llama": lambda size=size: write(model, left[:size], count=count).numel(),
            "latent, 4 steps": lambda: think(4),
            "latent, 16 steps": lambda: think(16),
        }
        rates: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(repeats):
            for name, method in methods.items():
                start = time.process_time()
                tokens = method()
                rates[name].append(tokens / (time.process_time() - start))
        for name, found in rates.items():
            ratio = median(a / b for a, b in zip(found, rates["Llama"], strict=True))
            print(f"| {size} | {name} | {median(found):.0f} | {ratio:.2f} |")


def show_samples(thinker: Thinker, model: Any, held_out: Encoded, task: Prose, shown: int) -> None:
    """Print samples of both, and the Llama's nats per token of all of them and of the true paragraphs."""
    width, eos, tokenizer = held_out.prompts.shape[1], thinker.tokenizer.eos_token_id, thinker.tokenizer
    truth = llama_rows(held_out, eos)
    prompts = [e.prompt for e in held_out.examples]

    def rows(texts: list[list[int]]) -> Tensor:
        ids = torch.zeros_like(truth)
        ids[:, :width] = truth[:, :width]
        for row, text in zip(ids, texts, strict=True):
            row[width : width + len(text) + 1] = torch.tensor([*text, eos][: len(row) - width])
        return ids

    own = [
        r[: r.index(eos)] if eos in r else r
        for r in write(model, truth[:, :width], count=truth.shape[1] - width).tolist()
    ]
    told = {"true": truth, "Llama, T = 1": rows(own)}
    for steps in (4, 16):
        found = [samples[0] for samples in thinker.think(prompts, steps=steps, solver="ddim")]
        told[f"latent, {steps} steps"] = rows([tokenizer.convert_tokens_to_ids(f.text.split()) for f in found])
    print("| | nats per token under the Llama | tokens | entropy of its tokens |\n|---|---|---|---|")
    for name, ids in told.items():
        text = ids[:, width:][ids[:, width:] > eos]
        share = text.bincount() / len(text)
        with torch.no_grad():
            print(f"| {name} | {nats(model, ids, width):.2f} | {len(text)} | {torch.special.entr(share).sum():.2f} |")
    for index in range(0, len(prompts), -(-len(prompts) // shown)):
        print(f"\n{task.text(prompts[index])}\n")
        for name, ids in told.items():
            words = tokenizer.convert_ids_to_tokens(ids[index, width:].tolist(), skip_special_tokens=True)
            print(f"- {name}: {task.text(' '.join(words))}")


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/prose"), help="folder of the models")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--base", default="chunk-8x32", choices=SHAPES, help="autoencoder of the denoiser")
    parser.add_argument("--chunk-steps", type=int, default=1500)
    parser.add_argument("--thought-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=400, help="of the denoiser and of the Llama")
    parser.add_argument("--rows", type=int, default=256, help="held-out runs of blocks for the denoiser and the Llama")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = Prose()
    print(describe("latent_prose.py", sys.argv[1:]))
    print("| autoencoder | noise | tokens right, % | blocks exact, % | BLEU |\n|---|---|---|---|---|", flush=True)
    for name in args.shapes:
        model, tokenizer = load_autoencoder(trained(name, args, train_autoencoder(name, args)))
        train, held_out = (
            encode(list(task.examples()), tokenizer, split=s, held_out=task.held_out) for s in ("train", "validation")
        )
        show_autoencoder(name, model, task, tokenizer, *new_blocks(train, held_out))
    held_out = first_rows(held_out, args.rows)
    thinker = load_thinker(trained(f"denoiser on {args.base}", args, train_denoiser(args)))
    size = sum(p.numel() for p in thinker.denoiser.parameters()) / 1e6
    print(f"\nheld out: {len(held_out.examples)} runs of blocks; denoiser: {size:.2f} M\n")
    show_denoising(denoising(thinker, held_out, task), args.plot)
    llama = LlamaForCausalLM.from_pretrained(trained("llama", args, train_llama(train, tokenizer, args))).eval()
    print(f"\nLlama: {llama.num_parameters() / 1e6:.2f} M\n")
    show_speed(thinker, llama, held_out, args.repeats)
    print()
    show_samples(thinker, llama, held_out, task, args.samples)


if __name__ == "__main__":
    main()
