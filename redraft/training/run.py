"""One training run, from a resolved configuration to a folder that `redraft.load` reads."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from redraft.data.collate import gzip_bits_per_byte, unigram_nats
from redraft.data.prepare import PreparedData, StreamedWindows, prepare
from redraft.data.tokenizer import token_byte_lengths
from redraft.folders import one_writer
from redraft.likelihood.problem import Estimate
from redraft.models.attention import choose_attention
from redraft.models.denoiser import Denoiser
from redraft.training.adapter import enable_checkpointing, num_parameters
from redraft.training.arguments import arguments_of
from redraft.training.callbacks import Averaging, Clock, LogFile, Progressed, StoppedBySignal
from redraft.training.checkpoint import last_whole_checkpoint, step_of, tidy, told_of_the_disk
from redraft.training.config import RECIPE_FILE, RunConfig, differences
from redraft.training.curve import CURVE_FILE, draw_curve
from redraft.training.ema import WeightAverage
from redraft.training.identity import check_identity, check_settings, identity
from redraft.training.launch import check_division
from redraft.training.loop import KeyedTrainer
from redraft.training.machine import bfloat16_is_faster, keep_freed_memory, runs_on_cpu
from redraft.training.output import lasting_output, say
from redraft.training.pace import Config, compile_if_it_pays, fitted_to_minutes
from redraft.training.preference import PreferenceTrainer
from redraft.training.start import build_denoiser, load_start
from redraft.training.trainer import DiffusionTrainer
from redraft.training.verdict import Outcome, announce, divergence, weight_norm, worse_than_chance

FROM_SCRATCH = {"preset": "llada-random", "temperature": 0.9}
"""Sampler that a model of random weights is saved with: taking the surest first, a small one repeats one token."""
BYTES_PER_PARAMETER = {"checkpoint": 12, "model": 4}  # float32 weights with AdamW's two moments; the weights alone


def run(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> Outcome:
    """Train, evaluate and save. Raises ValueError for every mistake that can be known before the first step."""
    with alone(config):
        return _run(config, resume=resume, console=console or Console())


@contextmanager
def alone(config: Config) -> Iterator[None]:
    """Keep other runs out of the folder of this one, and keep its output from ending it."""
    state = PartialState(cpu=runs_on_cpu(config.train.device))
    lock = one_writer(Path(config.out)) if state.is_main_process else nullcontext()
    with lasting_output(), lock:
        yield


def _run(config: RunConfig, *, resume: bool, console: Console) -> Outcome:
    config, checkpoint = begin(config, resume=resume, console=console)
    start = load_start(config)
    data = prepare(config.data, tokenizer=None if start is None else start.tokenizer, objective=config.objective.kind)
    _announce_data(data, config, console, is_main=PartialState().is_main_process)
    config = _with_steps(config, data)

    torch.manual_seed(config.train.seed)
    denoiser = build_denoiser(config, start, tokenizer=data.tokenizer)
    if data.generation:
        denoiser.model.config.generation = data.generation
    elif start is None and config.objective.kind in ("masked", "block"):
        denoiser.model.config.generation = dict(FROM_SCRATCH)
    if checkpoint:
        check_settings(Path(checkpoint), denoiser)
    num_trained, num_all = num_parameters(denoiser.model)
    check_disk(config, num_trained)
    of = f"trains {num_trained / 1e6:.2f} M of {num_all / 1e6:.2f} M parameters"
    say(console, f"model: {config.model.start or config.model.architecture}, {of}")
    trainer = _build_trainer(config, data, denoiser)
    compile_if_it_pays(config.train, trainer, console)
    outcome = drive(
        config,
        trainer,
        tokenizer=data.tokenizer,
        checkpoint=checkpoint,
        console=console,
        measure=config.objective.measure,
    )
    return outcome if outcome.signal else _finish(outcome, trainer, data, console, config)


def begin(config: Config, *, resume: bool, console: Console) -> tuple[Config, str | None]:
    """Resolve what is to be run, and the checkpoint to go on from. Raises ValueError where the folder does not fit.

    The caller holds the folder (`alone`).
    """
    folder = Path(config.out)
    state = PartialState(cpu=runs_on_cpu(config.train.device))
    config = _as_begun(config) if resume else _with_precision(config)
    check_division(config.train.batch_size, state.num_processes)
    check_folder(folder, resume=resume)
    be_quiet()
    checkpoint = _checkpoint_to_go_on_from(folder, console, state) if resume else None
    if checkpoint:
        check_identity(Path(checkpoint), identity(config))
    if resume and state.is_main_process:
        start = f"step {step_of(checkpoint)}" if checkpoint else "the beginning, as there is no checkpoint"
        say(console, f"going on from {start}")
    return config, checkpoint


def drive(
    config: Config,
    trainer: KeyedTrainer,
    *,
    tokenizer: Any,
    checkpoint: str | None,
    console: Console,
    measure: str = "NELBO",
) -> Outcome:
    """Run the loop from its start or a checkpoint, to its end or to a signal; the folder says how to go on."""
    folder = Path(config.out)
    progress, log, stopped = Progressed(console, measure=measure), LogFile(folder, console), StoppedBySignal(console)
    progress.trainer = trainer
    for callback in (progress, log, stopped):
        trainer.add_callback(callback)
    if trainer.average:
        trainer.add_callback(Averaging(trainer.average))
    keep_freed_memory()
    if minutes := config.train.max_minutes:
        config = config if checkpoint else fitted_to_minutes(config, trainer, console)
        trainer.add_callback(Clock(console, minutes=minutes))
    trainer.objective, trainer.saved_tokenizer = identity(config), tokenizer
    trainer.accelerator.wait_for_everyone()  # they have all looked at the folder before one of them writes to it
    if trainer.is_world_process_zero():
        with told_of_the_disk(RECIPE_FILE, folder):
            folder.mkdir(parents=True, exist_ok=True)
            config.save(folder)
            tokenizer.save_pretrained(folder)
    if trainer.average and checkpoint:
        trainer.average.load(Path(checkpoint))
    norm_before = weight_norm(trainer.model)
    if checkpoint and step_of(checkpoint) >= trainer.args.max_steps:  # stopped between its last step and its end
        trainer._load_from_checkpoint(checkpoint)
        trainer.remove_callback(TensorBoardCallback)  # without a training it would write into the working folder
        saved = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        trainer.state.global_step, trainer.state.epoch = saved.global_step, saved.epoch
        if trainer.is_world_process_zero():
            log.drop_final_evaluation(step=trainer.state.global_step)
    else:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            progress.close()
            stopped.restore()
    steps = trainer.state.global_step
    if stopped.received:
        say(console, f"stopped at step {steps}. To go on: {config.resume_command}")
    elif trainer.is_world_process_zero():
        tidy(folder, step=steps, keep=config.train.keep_checkpoints)
    norm = weight_norm(trainer.model)
    diverged = divergence(folder, norm_before=norm_before, norm=norm) if trainer.is_world_process_zero() else None
    return Outcome(folder=folder, steps=steps, diverged=diverged, signal=stopped.received)


def _with_precision(config: Config) -> Config:
    """Resolve the precision once for all processes and for every resume: it is decided by a measurement."""
    train = config.train
    if train.precision != "auto":
        return config
    (chosen,) = broadcast_object_list(["bfloat16" if bfloat16_is_faster(train.device) else "float32"])
    return dataclasses.replace(config, train=dataclasses.replace(train, precision=chosen))


def _with_steps(config: RunConfig, data: PreparedData) -> RunConfig:
    """Turn epochs into steps, rounded up; a pass has as many as it fills whole.

    Raises ValueError for a stream, whose length is not known.
    """
    train = config.train
    if train.epochs is None:
        return config
    if isinstance(data.train, StreamedWindows):
        raise ValueError(
            f"train.epochs needs the length of the data, which a stream does not tell; got {train.epochs}."
        )
    rows = train.batch_size * train.accumulation
    steps = math.ceil(train.epochs * (len(data.train) // rows))
    return dataclasses.replace(config, train=dataclasses.replace(train, max_steps=steps))


def _as_begun(config: Config) -> Config:
    """Return the configuration of the run in the folder. Raises ValueError where another one is asked for."""
    path = Path(config.out) / RECIPE_FILE
    if not path.exists():
        raise ValueError(f"{config.out} holds no run to resume. Leave out --resume to start one.")
    saved = type(config).read(path, is_whole=True)
    ignored = ["out:"]
    if config.train.max_minutes or config.train.epochs:
        ignored.append("train.max_steps:")  # they were fitted to the minutes or the data
    if config.train.precision == "auto":
        ignored.append("train.precision:")  # it was measured
    changed = [change for change in differences(saved, config) if not change.startswith(tuple(ignored))]
    if changed:
        raise ValueError(
            f"--resume continues {config.out} as it was begun, but these settings differ: {'; '.join(changed)}. "
            "Leave them out, or start a new run with another --out."
        )
    return dataclasses.replace(saved, out=config.out)


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raise ValueError where a new run would be written over another."""
    is_run = (folder / RECIPE_FILE).exists() or (folder / "config.json").exists()
    if is_run and not resume:
        raise ValueError(f"{folder} holds a run. Continue it with --resume, or choose another --out.")


def _checkpoint_to_go_on_from(folder: Path, console: Console, state: PartialState) -> str | None:
    """Choose the newest whole checkpoint, for all processes alike."""
    quiet = console if state.is_main_process else Console(quiet=True)
    (chosen,) = broadcast_object_list([last_whole_checkpoint(folder, quiet)])
    return chosen


def check_disk(config: Config, num_trained: int) -> None:
    """Raise ValueError where the checkpoints of the run cannot fit."""
    keep, existing = config.train.keep_checkpoints, _nearest_existing(Path(config.out))
    needed = num_trained * (BYTES_PER_PARAMETER["checkpoint"] * (keep + 1) + BYTES_PER_PARAMETER["model"])
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"the checkpoints of this run need {needed / 1e6:,.1f} MB and {existing} has {free / 1e6:,.1f} MB free. "
            "Free some, choose another --out, or lower --train.keep-checkpoints."
        )


def _nearest_existing(folder: Path) -> Path:
    """Find the folder itself, or the closest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _announce_data(data: PreparedData, config: RunConfig, console: Console, *, is_main: bool) -> None:
    if not is_main:
        console.quiet = True
    for name, report in (("train", data.train_report), ("held out", data.validation_report)):
        if report is None:  # a stream is not read yet
            continue
        say(console, f"{name}: {report.describe(seq_len=config.data.seq_len)}")
    if config.data.max_documents is not None:
        say(console, f"no more than the first {config.data.max_documents} documents are used (--data.max-documents)")
    rows, shorter = config.train.batch_size * config.train.accumulation, " or --data.seq-len"
    unit, remedy = ("pairs" if config.data.kind == "preference" else "windows"), shorter
    if ":" in config.data.kind:
        unit, remedy = "rows", ", or give more examples"
    if not isinstance(data.train, StreamedWindows) and len(data.train) < rows:
        raise ValueError(
            f"the corpus fills {len(data.train)} {unit}, fewer than the {rows} of one step "
            f"(batch_size x accumulation). Lower --train.batch-size{remedy}."
        )


def _build_trainer(config: RunConfig, data: PreparedData, denoiser: Denoiser) -> DiffusionTrainer:
    train = config.train
    arguments = arguments_of(
        train,
        out=config.out,
        per_device_eval_batch_size=train.batch_size // PartialState().num_processes,
        eval_strategy="steps" if train.eval_every and len(data.validation) else "no",
        eval_steps=train.eval_every or None,
        ddp_find_unused_parameters=False,
    )
    if train.gradient_checkpointing:
        enable_checkpointing(denoiser.model)
    denoiser.model.to(arguments.device)  # before the average is copied from it
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    attention = choose_attention(denoiser.model, train.attention, device=arguments.device, dtype=dtype)
    denoiser = dataclasses.replace(denoiser, attention=attention)
    average = WeightAverage(denoiser.model, decay=train.ema_decay) if train.ema_decay else None
    train_dataset = data.train
    if isinstance(train_dataset, StreamedWindows):
        train_dataset = dataclasses.replace(train_dataset, is_endless=True)
    byte_lengths = token_byte_lengths(data.tokenizer)
    kind: Any = DiffusionTrainer
    if config.data.kind == "preference":
        kind = partial(PreferenceTrainer, beta=config.objective.beta, num_samples=config.objective.num_samples)
    return kind(
        denoiser,
        config.objective.build(
            mask_token_id=denoiser.settings.mask_token_id, vocab_size=denoiser.model.config.vocab_size
        ),
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=_evenly(data.validation, train.eval_windows),
        pad_token_id=data.tokenizer.pad_token_id or 0,  # some have none; padding is told by its segment
        token_byte_lengths=byte_lengths if config.data.kind == "text" else torch.zeros_like(byte_lengths),
        has_padding=config.data.has_padding,
        isolate_segments=config.data.isolates_segments,
        groups_lengths=config.data.kind == "chat" and config.data.chat.batching == "grouped",
        average=average,
        max_skipped=train.max_skipped,
        uses_muon=train.optimizer == "muon",
    )


def _evenly(dataset: Any, count: int) -> Any:
    """Take `count` windows spread evenly over a dataset."""
    if len(dataset) <= count:
        return dataset
    return torch.utils.data.Subset(dataset, [i * len(dataset) // count for i in range(count)])


def _finish(
    outcome: Outcome, trainer: DiffusionTrainer, data: PreparedData, console: Console, config: RunConfig
) -> Outcome:
    """Save the model, evaluate on the held-out windows, draw the curve."""
    save_model(trainer, outcome.folder)
    if len(data.validation):
        held_out = _evenly(data.validation, config.train.final_eval_windows or len(data.validation))
        trainer.eval_dataset = held_out
        metrics = trainer.evaluate()
        if "eval_nats_per_token" in metrics:
            estimate = Estimate(
                nats_per_token=metrics["eval_nats_per_token"],
                standard_error=metrics["eval_standard_error"],
                bits_per_byte=metrics.get("eval_bits_per_byte"),
            )
            measure, chance = config.objective.measure, math.log(len(data.tokenizer))
            diverged = outcome.diverged or worse_than_chance(estimate, chance=chance, measure=measure)
            outcome = dataclasses.replace(outcome, held_out=estimate, diverged=diverged)
            if config.data.kind == "text":  # of answers the prompts and the EOS that fills blocks up are no text
                outcome = dataclasses.replace(
                    outcome,
                    unigram_nats=unigram_nats(held_out, vocab_size=len(data.tokenizer)),
                    gzip_bits_per_byte=gzip_bits_per_byte(held_out, data.tokenizer),
                )
    if trainer.is_world_process_zero():
        with told_of_the_disk(CURVE_FILE, outcome.folder):
            draw_curve(outcome.folder, console=console)
        announce(outcome, console, measure=config.objective.measure)
    return outcome


def save_model(trainer: Any, folder: Path) -> None:
    """Write the model aside and move it, the weights last: a folder with weights is a finished one."""
    staging = folder / ".model"
    swapped = trainer.average.swapped_in() if trainer.average else nullcontext()
    with swapped, told_of_the_disk("the model", folder):
        trainer.save_model(str(staging))
        if trainer.is_world_process_zero():
            (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle of what recipe.json says
            for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".safetensors"):
                path.replace(folder / path.name)
            staging.rmdir()
    trainer.accelerator.wait_for_everyone()


def be_quiet() -> None:
    """Leave the screen to our own lines; warnings of transformers still come through."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
