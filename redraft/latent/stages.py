"""Training thoughts in stages: autoencoder, teacher-forced denoiser, rollout. Each is a run with its own recipe."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from redraft.data.tokenizer import require_eos_token
from redraft.latent.autoencoder import AutoencoderConfig, TextAutoencoder, gate_failures, measure_gate
from redraft.latent.checkpoint import load_autoencoder, load_thinker, require_stage
from redraft.latent.config import AUTOENCODER_FOLDER, LatentRunConfig
from redraft.latent.denoiser import LatentDenoiser, LatentDenoiserConfig
from redraft.latent.encode import EncodedExamples, encode_split, word_tokenizer
from redraft.latent.objective import ForcedLoss, RolloutLoss
from redraft.latent.sequence import StepShare, ThoughtBatch
from redraft.latent.tasks import ExampleFile, ThoughtTask, find_task, held_out_prompts
from redraft.latent.thinking import Thinker
from redraft.models.device import choose_device
from redraft.models.load import read_config, read_raw_config, read_tokenizer
from redraft.training.adapter import num_parameters
from redraft.training.checkpoint import explain_disk_errors
from redraft.training.loop import Batch, KeyedTrainer
from redraft.training.output import say
from redraft.training.pace import Pacer
from redraft.training.plan import Clock
from redraft.training.run import alone, begin, check_disk, drive, save_model
from redraft.training.verdict import RunResult, announce

LATENT_NOISE = 1.0
"""Largest noise on the latents in the training of a decoder, in standard deviations."""
KL_WEIGHT = 1e-4
FINAL_STEPS, FINAL_PROMPTS = 10, 100


Losses = dict[str, Tensor]
LossFunction = Callable[[Any, Batch, StepShare], Losses]
"""(the model as the trainer wraps it, batch, its share in the step) -> losses by name; `loss` is minimised."""


class StageRows(Dataset[dict[str, Tensor]]):
    """Rows of equally long tensors."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Batch:
        return {name: column[index] for name, column in self.columns.items()}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage gives to the training loop, and what it does after the training."""

    model: Any
    rows: StageRows
    losses: LossFunction
    tokenizer: Any
    finish: Callable[[Console], None] = lambda _: None
    """Called before the trained model is saved."""
    report: Callable[[Console], None] = lambda _: None
    """Called once it is saved."""
    autoencoder: TextAutoencoder | None = None
    """Saved with the model."""


class StageTrainer(KeyedTrainer):
    """Minimise `losses(wrapped_model, batch, share)["loss"]`; the other entries are logged beside it."""

    timed_steps = 32  # more than elsewhere: only some steps, at random, have a second pass
    closing_seconds = 20.0  # prompts are thought about at the end

    def __init__(self, stage: Stage, config: LatentRunConfig) -> None:
        """Raise ValueError where there are fewer rows than in a step, or several processes."""
        train = config.train
        if len(stage.rows) < (step := train.batch_size * train.accumulation):
            raise ValueError(f"the task has {len(stage.rows)} rows, fewer than the {step} of a step. Lower batch_size.")
        super().__init__(config, stage.model, stage.tokenizer, train_dataset=stage.rows, data_collator=default_collate)
        if self.args.world_size > 1:
            raise ValueError(f"latent stages train in one process; got {self.args.world_size}. Leave torchrun out.")
        self.losses = stage.losses
        self._forget_parts()

    def count(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Count real blocks and answer tokens (where there are some), all real positions, and all positions."""
        items = [batch[name].sum() if name in batch else torch.tensor(0) for name in ("num_blocks", "is_answer")]
        masks = [column for column in batch.values() if column.dtype == torch.bool]
        real, positions = torch.stack([mask.sum() for mask in masks]).sum(), sum(mask.numel() for mask in masks)
        if "num_blocks" in batch:
            real, positions = real + items[0] * batch["blocks"].shape[2], positions + batch["blocks"][..., 0].numel()
        return torch.stack(items), real, positions

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute a batch's share of the loss of the global one."""
        batch = dict(inputs)
        num_blocks, num_answer = num_items_in_batch
        share = StepShare(
            seed=self.args.seed,
            step=self.state.global_step,
            rows=batch.pop("row"),
            total_rows=self._global_rows,
            num_blocks=num_blocks,
            num_answer=num_answer,
        )
        with self.accelerator.autocast():  # the heads run outside of the forward that accelerate wraps
            losses = self.losses(model, batch, share)
        for name, loss in losses.items():
            if name != "loss":
                self._sums[name] = self._sums.get(name, 0) + loss.detach()
                self._passes[name] += 1  # some steps have no such part
        return (losses["loss"], None) if return_outputs else losses["loss"]

    def forget_counts(self) -> None:
        """Reset the sums of the parts of the loss, too."""
        super().forget_counts()
        self._forget_parts()

    def _forget_parts(self) -> None:
        self._sums: dict[str, Any] = {}
        self._passes: Counter[str] = Counter()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the parts of the loss since the last line."""
        if "loss" in logs:
            split = self.args.gradient_accumulation_steps
            logs |= {name: round(float(total) * split / self._passes[name], 4) for name, total in self._sums.items()}
            self._forget_parts()
        super().log(logs, *args, **kwargs)


def run_stage(
    config: LatentRunConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
    task: ThoughtTask | None = None,
    clock: Clock | None = None,
) -> RunResult:
    """Train one stage and save it; `task` replaces the named one. Raises ValueError for mistakes, before it trains."""
    if task is not None:
        config = replace(config, task=None)
    console, clock = console or Console(), clock or Clock()
    with alone(config):
        config, checkpoint = begin(config, resume=resume, console=console)
        if task is None and config.task is None:
            raise ValueError(
                f"{config.out} was started with a task from Python, which its recipe cannot name. Continue there: "
                "run_stage(config, task=..., resume=True)."
            )
        torch.manual_seed(config.train.seed)
        make = {"autoencoder": _autoencoder, "denoiser": _denoiser, "rollout": _rollout}[config.stage]
        stage = make(config, task or find_task(str(config.task)))
        num_trained, _ = num_parameters(stage.model)
        check_disk(config, num_trained)
        say(console, f"{config.stage}: {num_trained / 1e6:.2f} M parameters, {len(stage.rows):,} rows")
        trainer = StageTrainer(stage, config)
        pacer = Pacer(trainer, config.train, clock=clock, console=console)
        result = drive(config, pacer, checkpoint=checkpoint)
        if result.signal:
            return result
        stage.model.eval()
        averaged = trainer.average.swapped_in if trainer.average else nullcontext
        with averaged():
            stage.finish(console)
        if stage.autoencoder is not None:
            with explain_disk_errors("the autoencoder", result.folder):
                stage.autoencoder.save_pretrained(result.folder / AUTOENCODER_FOLDER)
        save_model(trainer, result.folder)
        with averaged():
            stage.report(console)
        announce(result, console)
        return result


def _autoencoder(config: LatentRunConfig, task: ThoughtTask) -> Stage:
    shape, is_chunk = config.autoencoder, config.autoencoder.encoder is None
    tokenizer = word_tokenizer(list(task.examples())) if is_chunk else _tokenizer_of(str(shape.encoder))
    where = f"the tokenizer of {shape.encoder}"
    train, held_out = (encode_split(task, tokenizer, split=split, where=where) for split in ("train", "validation"))
    settings = AutoencoderConfig(
        **asdict(shape),
        kind="chunk" if is_chunk else "resampler",
        num_layers=0 if is_chunk else 1,
        vocab_size=len(tokenizer),
        block_tokens=train.columns["blocks"].shape[2],
        pad_token_id=tokenizer.pad_token_id or 0,
        task=config.task,
    )
    model = TextAutoencoder(settings)
    blocks, is_token = train.real_blocks()

    def losses(wrapped: Any, batch: Batch, share: StepShare) -> Losses:
        size = (settings.num_latents, settings.latent_dim)
        level = LATENT_NOISE * share.uniform(0)[:, None, None]
        noise = (level * share.normal(1, *size)).float()
        nats, kl = wrapped(batch["ids"], batch["mask"], noise, share.normal(2, *size).float())
        return {"nats_per_token": nats, "kl": kl, "loss": nats + KL_WEIGHT * kl}

    def finish(console: Console) -> None:
        model.fit_normalizer(blocks.to(model.device), is_token.to(model.device))
        ids, mask = (part.to(model.device) for part in held_out.real_blocks())
        model.config.gate = measure_gate(model, ids, mask)
        for level, exact in model.config.gate.items():
            say(console, f"blocks exact at relative noise {level}: {100 * exact:.1f} %")
        for failure in gate_failures(model.config.gate):
            say(console, f"the gate is not passed: {failure}")

    copies = -(-config.train.batch_size // len(blocks))  # repeat few distinct blocks, so that they fill a batch
    rows = StageRows(ids=blocks.repeat(copies, 1), mask=is_token.repeat(copies, 1))
    return Stage(model=model, rows=rows, losses=losses, tokenizer=tokenizer, finish=finish)


def _tokenizer_of(encoder: str) -> Any:
    """Load an encoder's tokenizer; BERT's separator ends its texts. Raises ValueError for one without an end token."""
    read_config(encoder, read_raw_config(encoder))
    tokenizer = read_tokenizer(encoder)
    require_eos_token(tokenizer)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def _denoiser(config: LatentRunConfig, task: ThoughtTask) -> Stage:
    start = str(config.start)
    require_stage(start, "autoencoder")
    autoencoder, tokenizer = load_autoencoder(start)
    failures = gate_failures(autoencoder.config.gate)
    if failures and not config.force:
        raise ValueError(f"the autoencoder {start} fails its gate: {'; '.join(failures)}. Train it longer, or --force.")
    torch.nn.Module.to(autoencoder, choose_device(None))
    block_tokens = {"block_tokens": autoencoder.config.block_tokens}
    train = encode_split(task, tokenizer, split="train", where=start, sizes=block_tokens)
    settings = LatentDenoiserConfig(
        **asdict(config.denoiser),
        vocab_size=len(tokenizer),
        prompt_tokens=train.columns["prompt"].shape[1],
        answer_tokens=train.columns["answer"].shape[1] if config.objective.answer_weight else 0,
        max_blocks=train.columns["blocks"].shape[1],
        num_latents=autoencoder.config.num_latents,
        latent_dim=autoencoder.config.latent_dim,
        eos_token_id=tokenizer.eos_token_id,
    )
    thinker, forced = Thinker(LatentDenoiser(settings), autoencoder, tokenizer), ForcedLoss(settings=config.objective)

    def losses(wrapped: Any, batch: Batch, share: StepShare) -> Losses:
        return forced(thinker.denoiser, ThoughtBatch(**batch), share, wrapped=wrapped)

    return _thinking_stage(task, thinker, thought_rows(thinker, train), losses)


def _rollout(config: LatentRunConfig, task: ThoughtTask) -> Stage:
    start = str(config.start)
    require_stage(start, "denoiser")
    thinker = load_thinker(start)
    model, shape = thinker.denoiser, thinker.denoiser.config
    shape.stage = "rollout"
    sizes = {"prompt_tokens": shape.prompt_tokens, "blocks": shape.max_blocks}
    sizes |= {"block_tokens": thinker.autoencoder.config.block_tokens}
    sizes |= {"answer_tokens": shape.answer_tokens} if shape.answer_tokens else {}
    train = encode_split(task, thinker.tokenizer, split="train", where=start, sizes=sizes)
    rows, forced, rollout = thought_rows(thinker, train), ForcedLoss(settings=config.objective), RolloutLoss()
    table = ThoughtBatch(**{name: column.to(model.device) for name, column in rows.columns.items()})
    rows.columns["same_prompt"] = rows_of_same_prompt([example.prompt for example in train.examples])

    def losses(wrapped: Any, batch: Batch, share: StepShare) -> Losses:
        thoughts = ThoughtBatch(**batch)
        first = forced(model, thoughts, share, wrapped=wrapped)
        second = rollout(model, thoughts, share, table=table)
        return first | second | {"loss": first["loss"] + second["loss"]}

    return _thinking_stage(task, thinker, rows, losses)


def rows_of_same_prompt(prompts: list[str], *, limit: int = 64) -> Tensor:
    """List for each row the rows with the same prompt, from itself on and repeated cyclically, at most `limit`."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[prompt].append(row)
    width = min(limit, max(map(len, groups.values())))
    starts = [bisect_left(groups[prompt], row) for row, prompt in enumerate(prompts)]
    return torch.tensor(
        [list(islice(cycle(groups[p]), start, start + width)) for p, start in zip(prompts, starts, strict=True)]
    )


def _thinking_stage(task: ThoughtTask, thinker: Thinker, rows: StageRows, losses: LossFunction) -> Stage:
    def report(console: Console) -> None:
        if not (prompts := held_out_prompts(task)[:FINAL_PROMPTS]):
            say(console, "the task has no held-out prompts, so the share of solved ones was not measured")
            return
        percent = 100 * share_solved(thinker, task, prompts)
        how = f"one sample, {FINAL_STEPS} steps a block"
        say(console, f"held out: {percent:.1f} % of {len(prompts)} prompts solved, {how}")

    return Stage(
        model=thinker.denoiser,
        rows=rows,
        losses=losses,
        tokenizer=thinker.tokenizer,
        report=report,
        autoencoder=thinker.autoencoder,
    )


def share_solved(thinker: Thinker, task: ThoughtTask, prompts: list[str]) -> float:
    """Return the share of prompts whose answer, from the answer decoder or else the thoughts, the verifier accepts."""
    if isinstance(task, ExampleFile):
        ids, words = partial(thinker.tokenizer, add_special_tokens=False), thinker.tokenizer.decode
        task = replace(task, read=lambda text: str(words(ids(text)["input_ids"], skip_special_tokens=True)))
    hits = 0
    for prompt, (sample,) in zip(prompts, thinker.think(prompts, steps=FINAL_STEPS), strict=True):
        hits += task.is_solved(prompt, sample.answer or task.answer([thought.text for thought in sample.thoughts]))
    return hits / len(prompts)


@torch.no_grad()
def thought_rows(thinker: Thinker, encoded: EncodedExamples) -> StageRows:
    """Encode the blocks once: rows of a `ThoughtBatch`, without answers for a model without an answer decoder."""
    columns = dict(encoded.columns)
    blocks, is_token = columns.pop("blocks"), columns.pop("is_block_token")
    pairs = zip(blocks.flatten(0, 1).split(512), is_token.flatten(0, 1).split(512), strict=True)
    device = thinker.autoencoder.device
    latents = [thinker.autoencoder.encode_normalized(ids.to(device), mask.to(device)).cpu() for ids, mask in pairs]
    if not thinker.denoiser.config.answer_tokens:
        columns |= {name: columns[name][:, :0] for name in ("answer", "is_answer")}
    return StageRows(**columns, blocks=torch.cat(latents).unflatten(0, blocks.shape[:2]))
