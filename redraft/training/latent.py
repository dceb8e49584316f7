"""Training thoughts in stages: autoencoder, teacher-forced denoiser, rollout. Each is a run with its own recipe."""

from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from redraft.data.sources import Split
from redraft.data.tasks import Encoded, ExampleFile, Task, encode, find_task, held_out_prompts, word_tokenizer
from redraft.data.tokenizer import require_eos_token
from redraft.latent.autoencoder import AutoencoderConfig, TextAutoencoder
from redraft.latent.checkpoint import AUTOENCODER_FOLDER, load_autoencoder, load_thinker, require_stage
from redraft.latent.denoiser import LatentDenoiser, LatentDenoiserConfig
from redraft.latent.gate import gate_failures, measure_gate
from redraft.latent.rollout import Known
from redraft.latent.sequence import Part, ThoughtBatch
from redraft.latent.thinking import Thinker
from redraft.models.device import choose_device
from redraft.models.load import read_config, read_raw_config, read_tokenizer
from redraft.randomness import normal, uniform
from redraft.training.adapter import num_parameters
from redraft.training.checkpoint import explain_disk_errors
from redraft.training.latent_config import LatentRunConfig
from redraft.training.latent_stage import Losses, Rows, Stage, stage_trainer
from redraft.training.loop import Batch
from redraft.training.output import say
from redraft.training.run import alone, begin, check_disk, drive, save_model
from redraft.training.verdict import RunResult, announce


def run_stage(
    config: LatentRunConfig, *, resume: bool = False, console: Console | None = None, task: Task | None = None
) -> RunResult:
    """Train one stage and save it; `task` overrules the named one. Raises ValueError for mistakes, before it trains."""
    if task is not None:
        config = replace(config, task=None)
    with alone(config):
        return _run_stage(config, resume=resume, console=console or Console(), task=task)


def _run_stage(config: LatentRunConfig, *, resume: bool, console: Console, task: Task | None) -> RunResult:
    config, checkpoint = begin(config, resume=resume, console=console)
    if task is None and config.task is None:
        raise ValueError(
            f"{config.out} was begun with a task of its own, which its recipe cannot name. Go on from Python: "
            "run_stage(config, task=..., resume=True)."
        )
    torch.manual_seed(config.train.seed)
    stage = {"autoencoder": _autoencoder, "denoiser": _denoiser, "rollout": _rollout}[config.stage](
        config, task or find_task(str(config.task))
    )
    num_trained, _ = num_parameters(stage.model)
    check_disk(config, num_trained)
    say(console, f"{config.stage}: {num_trained / 1e6:.2f} M parameters, {len(stage.rows):,} rows")
    trainer = stage_trainer(config, stage)
    outcome = drive(config, trainer, checkpoint=checkpoint, console=console)
    if outcome.signal:
        return outcome
    stage.model.eval()
    averaged = trainer.average.swapped_in if trainer.average else nullcontext
    with averaged():
        stage.finish(console)
    if stage.autoencoder is not None:
        with explain_disk_errors("the autoencoder", outcome.folder):
            stage.autoencoder.save_pretrained(outcome.folder / AUTOENCODER_FOLDER)
    save_model(trainer, outcome.folder)
    with averaged():
        stage.report(console)
    announce(outcome, console)
    return outcome


def _autoencoder(config: LatentRunConfig, task: Task) -> Stage:
    shape, examples = config.autoencoder, list(task.examples())
    tokenizer = word_tokenizer(examples) if shape.encoder is None else _tokenizer_of(shape.encoder)
    train = encode_split(task, tokenizer, split="train")
    held_out = encode_split(task, tokenizer, split="validation")
    num_layers = shape.num_layers
    if num_layers is None:
        num_layers = 0 if shape.kind == "chunk" else 1
    settings = AutoencoderConfig(
        kind=shape.kind,
        vocab_size=len(tokenizer),
        block_tokens=train.blocks.shape[2],
        num_latents=shape.num_latents,
        latent_dim=shape.latent_dim,
        hidden_size=shape.hidden_size,
        num_layers=num_layers,
        local=shape.local,
        pad_token_id=tokenizer.pad_token_id or 0,
        encoder=shape.encoder,
        task=config.task,
    )
    model = TextAutoencoder(settings)
    blocks, is_token = train.real_blocks()

    def losses(wrapped: Any, batch: Batch, step: int, part: Part) -> Losses:
        ids, size = batch["ids"], (settings.num_latents, settings.latent_dim)
        rows = part.rows[:, None]
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
            say(console, f"blocks exact at relative noise {level}: {100 * share:.1f} %")
        for failure in gate_failures(model.config.gate):
            say(console, f"the gate is missed: {failure}")

    copies = -(-config.train.batch_size // len(blocks))  # few distinct blocks: an epoch is at least a batch
    rows = Rows(ids=blocks.repeat(copies, 1), mask=is_token.repeat(copies, 1))
    return Stage(model=model, rows=rows, losses=losses, tokenizer=tokenizer, finish=finish)


def _tokenizer_of(encoder: str) -> Any:
    """Load an encoder's tokenizer; BERT's separator ends its texts. Raises ValueError where none would."""
    read_config(encoder, read_raw_config(encoder))
    tokenizer = read_tokenizer(encoder)
    require_eos_token(tokenizer)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def encode_split(task: Task, tokenizer: Any, *, split: Split) -> Encoded:
    """Encode one side of a split. Raises ValueError where it is empty, or has a word unknown to the tokenizer."""
    examples = list(task.examples())
    encoded = encode(examples, tokenizer, split=split, held_out=task.held_out)
    if not encoded.examples:
        side = "held-out blocks for the gate" if split == "validation" else "blocks to train on"
        raise ValueError(
            f"there are no {side}: of {len({e.prompt for e in examples})} prompts {100 * task.held_out:g} % are held "
            "out, by the hash of their text. Give examples with more prompts."
        )
    if unknown := encoded.unknown_words(tokenizer):
        raise ValueError(f"the tokenizer does not know {unknown[0]!r}. Give a task of the words it was made for.")
    return encoded


def _denoiser(config: LatentRunConfig, task: Task) -> Stage:
    assert config.start is not None
    require_stage(config.start, "autoencoder")
    autoencoder, tokenizer = load_autoencoder(config.start)
    check_gate(autoencoder, config.start, force=config.force)
    torch.nn.Module.to(autoencoder, choose_device(None))
    examples = list(task.examples())
    train = encode(examples, tokenizer, split="train", held_out=task.held_out)
    check_fits(train, tokenizer, config.start, block_tokens=autoencoder.config.block_tokens)
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
        can_guide=config.objective.drop_prompt > 0,
        can_revise=config.objective.joint > 0,
        adapts_times=config.objective.times == "adaptive",
    )
    if settings.answer == "masked" and settings.answer_tokens and tokenizer.mask_token_id is None:
        raise ValueError(
            "a masked answer needs a tokenizer with a mask token; this one has none. Use --denoiser.answer "
            "autoregressive."
        )
    thinker = Thinker(LatentDenoiser(settings), autoencoder, tokenizer)
    rows = thought_rows(autoencoder, train, with_answer=settings.answer_tokens > 0)
    return _thinking_stage(config, task, thinker, rows, config.objective)


def _rollout(config: LatentRunConfig, task: Task) -> Stage:
    assert config.start is not None
    require_stage(config.start, "denoiser")
    thinker = load_thinker(config.start)
    with_answer = thinker.denoiser.config.answer_tokens > 0
    if config.rollout.weight and not with_answer:
        raise ValueError(
            f"{config.start} has no answer decoder, which rollout.weight {config.rollout.weight:g} is for. Train it "
            "with an answer_weight, or --rollout.weight 0."
        )
    if config.objective.times == "adaptive" and not thinker.denoiser.config.adapts_times:
        raise ValueError(
            f"{config.start} was trained without adaptive times, which are learned from its first step on. Use "
            "--objective.times logit-normal or uniform."
        )
    thinker.denoiser.config.stage = "rollout"
    train = encode(list(task.examples()), thinker.tokenizer, split="train", held_out=task.held_out)
    shape = thinker.denoiser.config
    most = {"prompt_tokens": shape.prompt_tokens, "blocks": shape.max_blocks}
    if with_answer:
        most["answer_tokens"] = shape.answer_tokens
    check_fits(
        train, thinker.tokenizer, config.start, block_tokens=thinker.autoencoder.config.block_tokens, at_most=most
    )
    rows = thought_rows(thinker.autoencoder, train, with_answer=with_answer)
    known = {f.name: rows.columns[f.name] for f in fields(Known)}
    known_on = cache(lambda device: Known(**{name: column.to(device) for name, column in known.items()}))
    rows.columns["alike"] = alike([example.prompt for example in train.examples])

    def objective(model: Any, batch: ThoughtBatch, *, seed: int, step: int, part: Part, wrapped: Any) -> Losses:
        forced = config.objective(model, batch, seed=seed, step=step, part=part, wrapped=wrapped)
        own = config.rollout(model, batch, seed=seed, step=step, part=part, known=known_on(model.device))
        return forced | own | {"loss": forced["loss"] + own["loss"]}

    return _thinking_stage(config, task, thinker, rows, objective)


def alike(prompts: list[str], *, at_most: int = 64) -> Tensor:
    """For each row the rows with the same prompt, itself and those after it, round and round: (rows, most of them)."""
    found: dict[str, list[int]] = {}
    places = []
    for row, prompt in enumerate(prompts):
        places.append(len(found.setdefault(prompt, [])))
        found[prompt].append(row)
    width = min(at_most, max(map(len, found.values())))
    return torch.tensor(
        [
            [found[prompt][(place + step) % len(found[prompt])] for step in range(width)]
            for place, prompt in zip(places, prompts, strict=True)
        ]
    )


def _thinking_stage(config: LatentRunConfig, task: Task, thinker: Thinker, rows: Rows, objective: Any) -> Stage:
    model, tokenizer = thinker.denoiser, thinker.tokenizer

    def losses(wrapped: Any, batch: Batch, step: int, part: Part) -> Losses:
        return objective(model, ThoughtBatch(**batch), seed=config.train.seed, step=step, part=part, wrapped=wrapped)

    def report(console: Console) -> None:
        held_out = held_out_prompts(task)
        if not held_out:
            say(console, "the task holds out no prompt to measure this on")
            return
        share, count = solved(thinker, task, held_out[:FINAL_PROMPTS])
        say(
            console, f"held out: {100 * share:.1f} % of {count} prompts solved, one sample, {FINAL_STEPS} steps a block"
        )

    return Stage(
        model=model,
        rows=rows,
        losses=losses,
        tokenizer=tokenizer,
        report=report,
        autoencoder=thinker.autoencoder,
    )


FINAL_STEPS, FINAL_PROMPTS = 10, 100


def solved(thinker: Thinker, task: Task, prompts: list[str]) -> tuple[float, int]:
    """Return the share of the prompts that the verifier accepts, and how many there are.

    Judged is what the decoded thoughts say; for a file, which does not tell how an answer follows, the decoded answer.
    """
    if isinstance(task, ExampleFile):
        ids, words = partial(thinker.tokenizer, add_special_tokens=False), thinker.tokenizer.decode
        task = replace(task, read=lambda text: str(words(ids(text)["input_ids"], skip_special_tokens=True)))
    found = thinker.think(prompts, steps=FINAL_STEPS)
    hits = []
    for prompt, (sample,) in zip(prompts, found, strict=True):
        read = task.answer([thought.text for thought in sample.thoughts])
        hits.append(task.is_solved(prompt, sample.answer or read if isinstance(task, ExampleFile) else read))
    return sum(hits) / max(len(hits), 1), len(hits)


def check_gate(autoencoder: TextAutoencoder, path: str, *, force: bool) -> None:
    """Raise ValueError for an autoencoder without a normaliser, and for one that fails its gate unless forced."""
    autoencoder.require_normalizer()
    failures = gate_failures(autoencoder.config.gate)
    if failures and not force:
        raise ValueError(f"the autoencoder {path} fails its gate: {'; '.join(failures)}. Train it longer, or --force.")


def check_fits(
    encoded: Encoded, tokenizer: Any, path: str, *, block_tokens: int, at_most: dict[str, int] | None = None
) -> None:
    """Raise ValueError for a task with other words than the stage before, other blocks, or more of something."""
    shapes = {
        "prompt_tokens": encoded.prompts.shape[1],
        "answer_tokens": encoded.answers.shape[1],
        "blocks": encoded.blocks.shape[1],
    }
    found = [f"{n} {shapes[n]}, not {most} or fewer" for n, most in (at_most or {}).items() if shapes[n] > most]
    if encoded.blocks.shape[2] != block_tokens:
        found.append(f"blocks of {encoded.blocks.shape[2]} tokens, not {block_tokens}")
    if unknown := encoded.unknown_words(tokenizer):
        found.append(f"words that it does not know, {unknown[0]!r} the first")
    if found:
        raise ValueError(f"{path} was trained on another task; got {'; '.join(found)}. Give its own with --task.")


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
