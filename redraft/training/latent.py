"""Training thoughts in stages: autoencoder, teacher-forced denoiser, rollout. Each stage is a run with its own recipe.

The loop is transformers' Trainer with the callbacks, the EMA and the saving of `DiffusionTrainer`, which itself does
not fit: it counts tokens of windows and holds a model of logits, and these stages have other inputs and losses.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from redraft.data.tasks import Encoded, Task, encode, find_task, word_tokenizer
from redraft.latent.autoencoder import AutoencoderConfig, TextAutoencoder, gate_failures, measure_gate
from redraft.latent.checkpoint import AUTOENCODER_FOLDER, load_autoencoder, load_thinker, require_stage
from redraft.latent.denoiser import LatentDenoiser, LatentDenoiserConfig
from redraft.latent.sequence import ThoughtBatch
from redraft.latent.thinking import Thinker
from redraft.models.load import load_tokenizer
from redraft.randomness import normal, uniform
from redraft.training.callbacks import Averaging, Clock, LogFile, Progressed, StoppedBySignal
from redraft.training.config import RECIPE_FILE
from redraft.training.ema import WeightAverage
from redraft.training.latent_config import LatentRunConfig
from redraft.training.machine import keep_freed_memory
from redraft.training.run import be_quiet, check_folder, common_arguments, save_model

Losses = dict[str, Tensor]


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of equally long tensors, fetched a batch at a time."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: column[indices] for name, column in self.columns.items()}


def _as_is(batch: Any) -> Any:
    """`Rows` fetches whole batches: there is nothing to collate."""
    return batch


class StageTrainer(Trainer):
    """Minimise `losses(wrapped_model, batch, step)["loss"]`; the other entries are logged beside it."""

    def __init__(self, model: Any, losses: Callable[[Any, dict[str, Tensor], int], Losses], **kwargs: Any) -> None:
        super().__init__(model, data_collator=_as_is, **kwargs)
        if self.args.world_size > 1:
            raise ValueError(
                f"latent stages train in one process; got {self.args.world_size}. Start it without torchrun."
            )
        self.losses = losses
        self.average: WeightAverage | None = None
        self.tokens_seen, self.tokens_per_step, self._passes = 0, 0, 0
        self._useful, self._forwarded = torch.zeros((), dtype=torch.int64), 0
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch; noise is keyed by the number of the forward pass."""
        step = self.state.global_step * self.args.gradient_accumulation_steps + self._passes
        self._passes = (self._passes + 1) % self.args.gradient_accumulation_steps
        losses = self.losses(model, inputs, step)
        columns = [column for column in inputs.values() if column.ndim > 1 and column.dtype != torch.bool]
        positions = sum(column[..., 0].numel() if column.is_floating_point() else column.numel() for column in columns)
        self.tokens_per_step = positions * self.args.gradient_accumulation_steps
        self.tokens_seen += positions
        for mask in (column for column in inputs.values() if column.dtype == torch.bool):
            self._useful = self._useful.to(mask.device) + mask.sum()
            self._forwarded += mask.numel()
        for name, loss in losses.items():
            if name != "loss":
                total, count = self._sums.get(name, (torch.zeros_like(loss.detach()), 0))
                self._sums[name] = (total + loss.detach(), count + 1)
        return (losses["loss"], None) if return_outputs else losses["loss"]

    def efficiency(self) -> float:
        """Real tokens / padded tokens of prompts, blocks and answers since the last call."""
        share = float(self._useful) / self._forwarded if self._forwarded else 1.0
        self._useful, self._forwarded = torch.zeros((), dtype=torch.int64), 0
        return share

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the parts of the loss since the last line."""
        if "loss" in logs:
            logs |= {name: round(float(total) / count, 4) for name, (total, count) in self._sums.items()}
            self._sums = {}
        super().log(logs, *args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage hands to the loop, and what is done once it is trained."""

    model: Any
    rows: Rows
    losses: Callable[[Any, dict[str, Tensor], int], Losses]
    tokenizer: Any
    finish: Callable[[Console], None]
    autoencoder: TextAutoencoder | None = None


def run_stage(config: LatentRunConfig, *, console: Console | None = None, task: Task | None = None) -> Path:
    """Train one stage and save it; `task` overrules the named one. Raises ValueError for mistakes, before it trains."""
    console = console or Console()
    folder = Path(config.out)
    check_folder(folder, resume=False)
    be_quiet()
    torch.manual_seed(config.train.seed)
    stage = {"autoencoder": _autoencoder, "denoiser": _denoiser, "rollout": _rollout}[config.stage](
        config, task or find_task(config.task)
    )
    if task is not None and stage.autoencoder is None:
        stage.model.config.task = None  # one of the user's own: `redraft latent check` must be told
    size = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    console.print(f"{config.stage}: {size / 1e6:.2f} M parameters, {len(stage.rows):,} rows")
    trainer = _trainer(config, stage, console)
    keep_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n")
    stage.tokenizer.save_pretrained(folder)
    if stage.autoencoder is not None:
        stage.autoencoder.save_pretrained(folder / AUTOENCODER_FOLDER)
    trainer.train()
    stage.model.eval()
    if trainer.average:
        with trainer.average.swapped_in():
            stage.finish(console)
    else:
        stage.finish(console)
    save_model(trainer, folder)
    console.print(f"saved to {folder}")
    return folder


def _trainer(config: LatentRunConfig, stage: Stage, console: Console) -> StageTrainer:
    train = config.train
    arguments = TrainingArguments(
        **common_arguments(train, out=config.out),
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
    )
    if len(stage.rows) < train.batch_size:
        raise ValueError(
            f"the task has {len(stage.rows)} rows, fewer than train.batch_size {train.batch_size}. Lower it."
        )
    progress = Progressed(console)
    trainer = StageTrainer(
        stage.model,
        stage.losses,
        args=arguments,
        train_dataset=stage.rows,
        callbacks=[progress, LogFile(Path(config.out)), StoppedBySignal(console)],
    )
    progress.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    if train.ema_decay:
        trainer.average = WeightAverage(stage.model, decay=train.ema_decay)
        trainer.add_callback(Averaging(trainer.average))
    if train.max_minutes:
        trainer.add_callback(Clock(console, minutes=train.max_minutes))
    return trainer


def _autoencoder(config: LatentRunConfig, task: Task) -> Stage:
    shape, examples = config.autoencoder, list(task.examples())
    if shape.encoder is None:
        tokenizer = word_tokenizer(examples)
    else:
        tokenizer = load_tokenizer(shape.encoder)
    train = encode(examples, tokenizer, split="train", held_out=task.held_out)
    held_out = encode(examples, tokenizer, split="validation", held_out=task.held_out)
    saved = {f.name: getattr(shape, f.name) for f in fields(shape) if hasattr(AutoencoderConfig, f.name)}
    settings = AutoencoderConfig(
        **saved, vocab_size=len(tokenizer), block_tokens=train.blocks.shape[2], task=config.task
    )
    model = TextAutoencoder(settings)
    blocks, is_token = train.real_blocks()

    def losses(wrapped: Any, batch: dict[str, Tensor], step: int) -> Losses:
        ids, size = batch["ids"], (settings.num_latents, settings.latent_dim)
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        places = torch.arange(size[0] * size[1], device=ids.device)
        level = shape.latent_noise * uniform(config.train.seed, step, 0, rows)
        noise = (level * normal(config.train.seed, step, 1, rows, places)).unflatten(1, size).float()
        posterior = normal(config.train.seed, step, 2, rows, places).unflatten(1, size).float()
        hidden = uniform(config.train.seed, step, 3, rows, torch.arange(ids.shape[1], device=ids.device))
        nats, kl = wrapped(ids, batch["mask"], noise, posterior, hidden < shape.token_dropout)
        return {"nats_per_token": nats, "kl": kl, "loss": nats + shape.kl_weight * kl}

    def finish(console: Console) -> None:
        device = model.device
        model.fit_normalizer(blocks.to(device), is_token.to(device))
        model.config.gate = measure_gate(model, *(part.to(device) for part in held_out.real_blocks()))
        for level, share in model.config.gate.items():
            console.print(f"blocks exact at relative noise {level}: {100 * share:.1f} %")
        for failure in gate_failures(model.config.gate):
            console.print(f"the gate is missed: {failure}")

    copies = -(-config.train.batch_size // len(blocks))  # few distinct blocks: an epoch is at least a batch
    rows = Rows(ids=blocks.repeat(copies, 1), mask=is_token.repeat(copies, 1))
    return Stage(model=model, rows=rows, losses=losses, tokenizer=tokenizer, finish=finish)


def _denoiser(config: LatentRunConfig, task: Task) -> Stage:
    assert config.start is not None
    require_stage(config.start, "autoencoder")
    autoencoder, tokenizer = load_autoencoder(config.start)
    check_gate(autoencoder, config.start, force=config.force)
    examples = list(task.examples())
    train = encode(examples, tokenizer, split="train", held_out=task.held_out)
    settings = LatentDenoiserConfig(
        **asdict(config.denoiser),
        vocab_size=len(tokenizer),
        prompt_tokens=train.prompts.shape[1],
        answer_tokens=train.answers.shape[1] if config.objective.answer_weight else 0,
        max_blocks=train.blocks.shape[1],
        num_latents=autoencoder.config.num_latents,
        latent_dim=autoencoder.config.latent_dim,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,
        task=config.task,
    )
    thinker = Thinker(LatentDenoiser(settings), autoencoder, tokenizer)
    return _thinking_stage(config, task, thinker, examples, config.objective)


def _rollout(config: LatentRunConfig, task: Task) -> Stage:
    assert config.start is not None
    require_stage(config.start, "denoiser")
    thinker = load_thinker(config.start)
    if not thinker.denoiser.config.answer_tokens:
        raise ValueError(
            f"{config.start} has no answer decoder, whose loss rollout needs. Train it with an answer_weight."
        )
    thinker.denoiser.config.stage = "rollout"
    teacher = config.objective

    def objective(model: Any, batch: ThoughtBatch, *, seed: int, step: int, wrapped: Any = None) -> Losses:
        forced = teacher(model, batch, seed=seed, step=step, wrapped=wrapped)
        own = config.rollout(model, batch, seed=seed, step=step)
        return forced | own | {"loss": forced["loss"] + own["loss"]}

    return _thinking_stage(config, task, thinker, list(task.examples()), objective)


def _thinking_stage(
    config: LatentRunConfig, task: Task, thinker: Thinker, examples: list[Any], objective: Any
) -> Stage:
    model, tokenizer = thinker.denoiser, thinker.tokenizer
    train = encode(examples, tokenizer, split="train", held_out=task.held_out)
    held_out = encode(examples, tokenizer, split="validation", held_out=task.held_out)

    def losses(wrapped: Any, batch: dict[str, Tensor], step: int) -> Losses:
        return objective(model, ThoughtBatch(**batch), seed=config.train.seed, step=step, wrapped=wrapped)

    def finish(console: Console) -> None:
        torch.nn.Module.to(thinker.autoencoder, model.device)
        share, count = solved(thinker, task, [example.prompt for example in held_out.examples])
        console.print(
            f"held out: {100 * share:.1f} % of {count} prompts solved, one sample, {FINAL_STEPS} steps a block"
        )

    return Stage(
        model=model,
        rows=thought_rows(thinker.autoencoder, train, with_answer=model.config.answer_tokens > 0),
        losses=losses,
        tokenizer=tokenizer,
        finish=finish,
        autoencoder=thinker.autoencoder,
    )


FINAL_STEPS, FINAL_PROMPTS = 10, 100


def solved(thinker: Thinker, task: Task, prompts: list[str]) -> tuple[float, int]:
    """Return the share of the first distinct prompts whose decoded thoughts the verifier accepts, and how many."""
    chosen = list(dict.fromkeys(prompts))[:FINAL_PROMPTS]
    found = thinker.think(chosen, steps=FINAL_STEPS)
    hits = [
        task.is_solved(prompt, task.answer([thought.text for thought in samples[0].thoughts]))
        for prompt, samples in zip(chosen, found, strict=True)
    ]
    return sum(hits) / max(len(hits), 1), len(hits)


def check_gate(autoencoder: TextAutoencoder, path: str, *, force: bool) -> None:
    """Raise ValueError for an autoencoder without a normaliser, and for one that fails its gate unless forced."""
    autoencoder.require_normalizer()
    failures = gate_failures(autoencoder.config.gate)
    if failures and not force:
        raise ValueError(f"the autoencoder {path} fails its gate: {'; '.join(failures)}. Train it longer, or --force.")


@torch.no_grad()
def thought_rows(autoencoder: TextAutoencoder, encoded: Encoded, *, with_answer: bool = True) -> Rows:
    """Encode the blocks once: rows of a `ThoughtBatch`."""
    flat, mask = encoded.blocks.flatten(0, 1), encoded.is_block_token.flatten(0, 1)
    device = autoencoder.device
    pairs = zip(flat.split(512), mask.split(512), strict=True)
    latents = torch.cat([autoencoder.encode_normalized(ids.to(device), kept.to(device)).cpu() for ids, kept in pairs])
    width = encoded.answers.shape[1] if with_answer else 0
    return Rows(
        prompt=encoded.prompts,
        is_prompt=encoded.is_prompt,
        blocks=latents.unflatten(0, encoded.blocks.shape[:2]),
        num_blocks=encoded.num_blocks,
        answer=encoded.answers[:, :width],
        is_answer=encoded.is_answer[:, :width],
    )
