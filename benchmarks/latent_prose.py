"""Latent thinking on real prose: paragraphs of the standard library's docstrings, a block of thought for each piece.

    python benchmarks/latent_prose.py --seeds 0 1 2 --runs runs/prose --plot docs/latent-prose.svg

1. Autoencoders of several shapes on held-out blocks: tokens right, blocks exact, BLEU, by relative noise on latents.
2. A denoiser on the one named by --base: BLEU of its one-step estimate of x_0 against t, given the true blocks before
   (area under it: AuBLEU, arXiv 2306.02531), beside z_t decoded as it is, the best linear estimate
   alpha z_t / (alpha^2 + sigma^2), and the denoiser given another row's prompt and blocks; and the squared errors.
3. Generation beside a stock Llama of the same width and depth with a cache: tokens per CPU second and samples; the
   Llama's nats per token of either's texts.

BLEU is sacrebleu's, of all blocks together. Of several seeds the tables show mean and deviation, the samples are the
first one's. Finished models stay in --runs and are not trained again.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
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

from redraft.latent.autoencoder import NOISE_LEVELS
from redraft.latent.checkpoint import load_autoencoder, load_thinker
from redraft.latent.config import AutoencoderShape, LatentRunConfig
from redraft.latent.encode import EncodedExamples, encode_examples
from redraft.latent.objective import lay_out
from redraft.latent.sequence import ThoughtBatch
from redraft.latent.stages import Stage, StageRows, StageTrainer, run_stage, thought_rows
from redraft.latent.thinking import Thinker
from redraft.recipes import RECIPES
from redraft.training.config import TrainConfig
from redraft.training.pace import Pacer
from redraft.training.plan import Clock
from redraft.training.run import drive

CHUNK = AutoencoderShape(num_latents=8, latent_dim=32, hidden_size=256)
SHAPES = {
    "12-to-8x32": (12, CHUNK),
    "12-to-4x64-local": (12, replace(CHUNK, num_latents=4, latent_dim=64, local=True)),
    "4-to-2x48-local": (4, replace(CHUNK, num_latents=2, latent_dim=48, local=True)),
}
"""Tokens of a block, and the autoencoder that makes so many vectors of it."""
TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
IGNORED = -100
Found = dict[str, list[float]]
"""Rows of a table of one seed by name."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of one seed: trained unless their folders are there; their cost is kept beside them."""

    args: argparse.Namespace
    seed: int

    def trained(self, name: str, train: Callable[[Path], Any]) -> Path:
        """Return the folder of a finished model."""
        folder = self.args.runs / f"seed-{self.seed}" / name
        cost = folder / "cpu-minutes"
        if not cost.exists():
            start = time.process_time()
            train(folder)
            cost.write_text(f"{(time.process_time() - start) / 60:.1f}")
        print(f"{name}: {cost.read_text()} CPU minutes of training", file=sys.stderr, flush=True)
        return folder

    def autoencoder(self, name: str) -> Path:
        """Train an autoencoder on every paragraph cut in several ways."""
        block_tokens, shape = SHAPES[name]
        recipe = RECIPES["latent-autoencoder"]()
        train = replace(
            recipe.train,
            max_steps=self.args.chunk_steps,
            batch_size=256,
            precision="bfloat16",
            save_every=10**9,
            seed=self.seed,
        )
        task = Prose(block_tokens=block_tokens, starts=tuple(range(1, block_tokens, max(block_tokens // 5, 1))))
        config = replace(recipe, autoencoder=shape, train=train)
        return self.stage(name, config, task)

    def denoiser(self, base: str, task: Prose) -> Path:
        """Train a denoiser without an answer decoder: the paragraph is its thoughts."""
        recipe = RECIPES["latent-denoiser"]()
        config = replace(
            recipe, start=str(self.autoencoder(base)), force=True,
            train=self.training(recipe.train, steps=self.args.steps, ema_decay=0.99),
            objective=replace(recipe.objective, answer_weight=0.0),
        )  # fmt: skip
        return self.stage(f"denoiser-{base}", config, task)

    def stage(self, name: str, config: LatentRunConfig, task: Prose) -> Path:
        """Train a latent stage."""
        return self.trained(
            name, lambda folder: whole(run_stage(replace(config, out=str(folder)), task=task, console=quiet()))
        )

    def llama(self, train: EncodedExamples, tokenizer: Any) -> Path:
        """Train a stock Llama of the denoiser's width and depth."""
        ids, width = llama_rows(train, tokenizer.eos_token_id), train.columns["prompt"].shape[1]

        def run(folder: Path) -> None:
            torch.manual_seed(self.seed)
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
                model=model, rows=StageRows(ids=ids, is_token=ids > 0), tokenizer=tokenizer,
                losses=lambda wrapped, batch, share: {"loss": nats(wrapped, batch["ids"], width)},
            )  # fmt: skip
            recipe = RECIPES["latent-denoiser"]()
            settings = self.training(recipe.train, steps=self.args.llama_steps, ema_decay=None)
            config = replace(recipe, out=str(folder), train=settings)
            pacer = Pacer(StageTrainer(stage, config), settings, clock=Clock(), console=quiet())
            whole(drive(config, pacer, checkpoint=None))
            model.save_pretrained(folder)

        return self.trained("llama", run)

    def training(self, train: TrainConfig, *, steps: int, ema_decay: float | None) -> TrainConfig:
        """Rows and precision of both generators."""
        return replace(
            train, batch_size=64, max_steps=steps, max_minutes=None, precision="bfloat16", ema_decay=ema_decay,
            save_every=10**9, seed=self.seed,
        )  # fmt: skip


def quiet() -> Console:
    """Tell of the training on standard error."""
    return Console(stderr=True)


def llama_rows(encoded: EncodedExamples, eos: int) -> Tensor:
    """Lay out [padded prompt | blocks | end], padded with id 0; the prompt's padding is at its start, and seen."""
    columns = [encoded.columns[name] for name in ("prompt", "is_prompt", "blocks", "is_block_token")]
    width, longest = columns[0].shape[1], columns[2][0].numel()
    rows = torch.zeros(len(columns[0]), width + longest + 1, dtype=torch.int64)
    for row, prompt, kept, blocks, is_token in zip(rows, *columns, strict=True):
        text = blocks[is_token]
        row[width - int(kept.sum()) : width] = prompt[kept]
        row[width : width + len(text) + 1] = torch.cat([text, torch.tensor([eos])])
    return rows


def nats(model: Any, ids: Tensor, width: int) -> Tensor:
    """Return the mean negative log-likelihood of what follows the prompts, in nats per token."""
    labels = torch.where(ids > 0, ids, IGNORED)[:, width:]
    logits = model(input_ids=ids, use_cache=False).logits[:, width - 1 : -1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def bleu(task: Prose, tokenizer: Any, ids: Tensor, truth: Tensor) -> float:
    """Return the corpus BLEU of blocks of token ids, their padding left out."""
    written, wanted = (
        [task.text(" ".join(tokenizer.convert_ids_to_tokens(row.tolist(), skip_special_tokens=True))) for row in rows]
        for rows in (ids, truth)
    )
    return float(corpus_bleu(written, [wanted]).score)


def new_blocks(train: EncodedExamples, held_out: EncodedExamples) -> tuple[Tensor, Tensor]:
    """Return the held-out blocks that are no blocks of the training data, and which of their tokens are real."""
    known = set(map(tuple, train.real_blocks()[0].tolist()))
    ids, mask = held_out.real_blocks()
    is_new = torch.tensor([tuple(row) not in known for row in ids.tolist()])
    return ids[is_new], mask[is_new]


def first_rows(encoded: EncodedExamples, count: int) -> EncodedExamples:
    """Take the first examples."""
    columns = {name: column[:count] for name, column in encoded.columns.items()}
    return EncodedExamples(examples=encoded.examples[:count], columns=columns)


def reconstructed(name: str, models: Models, task: Prose) -> Found:
    """Return tokens right, blocks exact and BLEU at every level of noise, of held-out blocks that are new."""
    model, tokenizer = load_autoencoder(models.autoencoder(name))
    ids, mask = new_blocks(*encoded(task, tokenizer))
    latents = model.encode_normalized(ids, mask).detach()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    rows = {}
    for level in NOISE_LEVELS:
        found = model.decode(latents + level * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)))
        right = 100 * float((found == ids)[mask].float().mean())
        exact = 100 * float((found == ids).all(1).float().mean())
        rows[f"{name} ({size:.1f} M), noise {level:g}"] = [right, exact, bleu(task, tokenizer, found, ids)]
    return rows


def encoded(task: Prose, tokenizer: Any) -> tuple[EncodedExamples, EncodedExamples]:
    """Encode both sides of the split."""
    examples, encode = list(task.examples()), partial(encode_examples, held_out=task.held_out)
    train, held_out = (encode(examples, tokenizer, split=split) for split in ("train", "validation"))
    return train, held_out


@torch.no_grad()
def one_step(thinker: Thinker, batch: ThoughtBatch, z_t: Tensor, t: float, *, shift: int) -> Tensor:
    """Estimate every block in one pass, given the clean ones before it, or prompt and blocks `shift` rows away."""
    model, (rows, count, size) = thinker.denoiser, z_t.shape[:3]
    names = ("prompt", "is_prompt", "blocks", "num_blocks")
    context = replace(batch, **{name: getattr(batch, name).roll(shift, 0) for name in names})
    clean, noisy = context.blocks.flatten(1, 2), z_t.flatten(1, 2)
    number, copy = torch.arange(1, count + 1).repeat(2), torch.arange(2).repeat_interleave(count)
    is_real = torch.cat([number[:count] <= n[:, None] for n in (context.num_blocks, batch.num_blocks)], dim=1)
    inputs = lay_out(
        model,
        context,
        z_t=torch.cat([clean, noisy], 1),
        guess=torch.cat([clean, torch.zeros_like(noisy)], 1),
        t=(t * copy).repeat_interleave(size).expand(rows, -1),
        number=number,
        copy=copy,
        is_real=is_real.repeat_interleave(size, 1),
        is_withheld=torch.zeros(rows, dtype=torch.bool),
    )
    return model.out(model(*inputs).latents[:, count * size :]).view(z_t.shape)


def denoising(thinker: Thinker, held_out: EncodedExamples, task: Prose) -> tuple[Found, Found]:
    """Return BLEU at every time of TIMES with the area under it (its mean over t), and the squared errors."""
    batch = ThoughtBatch(**thought_rows(thinker, held_out).columns)
    is_real = torch.arange(batch.blocks.shape[1]) < batch.num_blocks[:, None]
    scores: Found = {}
    errors: Found = {}
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
            scores.setdefault(name, []).append(bleu(task, thinker.tokenizer, ids, held_out.columns["blocks"][is_real]))
            errors.setdefault(name, []).append(float((x_0 - batch.blocks)[is_real].square().mean()))
    for found in scores.values():
        found.append(float(torch.trapezoid(torch.tensor(found), torch.tensor(TIMES))) / (TIMES[-1] - TIMES[0]))
    return scores, {name: found for name, found in errors.items() if name != "z_t as it is"}


def draw(scores: list[Found], plot: Path) -> None:
    """Draw the mean of BLEU over the seeds against t."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="t", ylabel="BLEU of the decoded estimate", ylim=(0, 100))
    for name in scores[0]:
        axes.plot(TIMES, [mean(column) for column in zip(*(s[name][:-1] for s in scores), strict=True)], "o-",
                  markersize=3, label=name)  # fmt: skip
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


def speed(thinker: Thinker, model: Any, held_out: EncodedExamples, repeats: int) -> Found:
    """Return tokens per CPU second and their ratio to the Llama's: medians of interleaved runs.

    Padding is no token; the Llama never stops early.
    """
    left, texts = (
        llama_rows(held_out, 1)[:, : held_out.columns["prompt"].shape[1]],
        [e.prompt for e in held_out.examples],
    )
    rows = {}
    count = held_out.columns["blocks"][0].numel()
    dials = {"blocks": thinker.denoiser.config.max_blocks, "solver": "ddim"}
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
            rows[f"{name}, batch {size}"] = [median(found), ratio]
    return rows


def samples(
    thinker: Thinker, model: Any, held_out: EncodedExamples, task: Prose, shown: int
) -> tuple[Found, list[str]]:
    """Sample from both: the Llama's nats per token of their texts and of the true ones, and some to read."""
    width, eos, tokenizer = held_out.columns["prompt"].shape[1], thinker.tokenizer.eos_token_id, thinker.tokenizer
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
    settings = {
        "4 steps": {"steps": 4}, "16 steps": {"steps": 16}, "16 steps, noise 0.6": {"steps": 16, "init_noise": 0.6}
    }  # fmt: skip
    for name, dials in settings.items():
        found = [own[0] for own in thinker.think(prompts, solver="ddim", **dials)]
        told[f"latent, {name}"] = rows([tokenizer.convert_tokens_to_ids(f.text.split()) for f in found])
    table = {}
    for name, ids in told.items():
        text = ids[:, width:][ids[:, width:] > eos]
        share = text.bincount() / len(text)
        with torch.no_grad():
            table[name] = [float(nats(model, ids, width)), len(text), float(torch.special.entr(share).sum())]
    read = []
    for index in range(0, len(prompts), -(-len(prompts) // shown)):
        read.append(f"\n{task.text(prompts[index])}\n")
        for name, ids in told.items():
            words = tokenizer.convert_ids_to_tokens(ids[index, width:].tolist(), skip_special_tokens=True)
            read.append(f"- {name}: {task.text(' '.join(words))}")
    return table, read


def show(columns: list[str], seeds: list[Found], digits: int = 1) -> None:
    """Print a table, of several seeds mean and deviation."""
    print(f"\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in seeds[0]:
        cells = list(zip(*(found[name] for found in seeds), strict=True))
        spread = [f" ± {stdev(cell):.{digits}f}" if len(cell) > 1 else "" for cell in cells]
        print(f"| {name} | {' | '.join(f'{mean(c):.{digits}f}{s}' for c, s in zip(cells, spread, strict=True))} |")
    sys.stdout.flush()


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/prose"), help="folder of the models")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--base", default="4-to-2x48-local", choices=SHAPES, help="autoencoder of the denoiser")
    parser.add_argument("--chunk-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=3000, help="of the denoiser")
    parser.add_argument("--llama-steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=256, help="held-out runs of blocks for the denoiser and the Llama")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(describe("latent_prose.py", sys.argv[1:]))
    every = [Models(args=args, seed=seed) for seed in args.seeds]
    for name in args.shapes:
        task = Prose(block_tokens=SHAPES[name][0])
        show(["tokens right, %", "blocks exact, %", "BLEU"], [reconstructed(name, models, task) for models in every])
    task = Prose(block_tokens=SHAPES[args.base][0])
    measured = [_generators(models, task) for models in every]
    scores, errors, rates, texts, read = zip(*measured, strict=True)
    show([f"BLEU at t = {TIMES[0]}", *map(str, TIMES[1:]), "area"], list(scores))
    show([f"squared error at t = {TIMES[0]}", *map(str, TIMES[1:])], list(errors), digits=3)
    if args.plot:
        draw(list(scores), args.plot)
    show(["tokens per CPU second", "x Llama"], list(rates), digits=2)
    show(["nats per token under the Llama", "tokens", "entropy of its tokens"], list(texts), digits=2)
    print("\n".join(read[0]))


def _generators(models: Models, task: Prose) -> tuple[Found, Found, Found, Found, list[str]]:
    """Measure one seed's denoiser and its Llama."""
    args = models.args
    thinker = load_thinker(models.denoiser(args.base, task))
    train, held_out = encoded(task, thinker.tokenizer)
    llama = LlamaForCausalLM.from_pretrained(models.llama(train, thinker.tokenizer)).eval()
    held_out = first_rows(held_out, args.rows)
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (thinker.denoiser, llama)]
    print(
        f"seed {models.seed}: denoiser of {sizes[0]:.2f} M parameters, Llama of {sizes[1]:.2f} M; "
        f"{len(held_out.examples)} held-out runs of blocks"
    )
    scores, errors = denoising(thinker, held_out, task)
    rates = speed(thinker, llama, held_out, args.repeats)
    return scores, errors, rates, *samples(thinker, llama, held_out, task, args.samples)


if __name__ == "__main__":
    main()
