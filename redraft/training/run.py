"""One training run, from a resolved configuration to a folder that `redraft.load` reads."""

import logging
import math
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from redraft.data.collate import gzip_bits_per_byte, unigram_nats
from redraft.data.prepare import PreparedData, StreamedWindows, prepare
from redraft.folders import one_writer
from redraft.likelihood.problem import Estimate
from redraft.processes import process_class
from redraft.training.adapter import num_parameters
from redraft.training.callbacks import GracefulStop, LogFile, ProgressLines
from redraft.training.checkpoint import check_identity, explain_disk_errors, last_whole_checkpoint, step_of, tidy
from redraft.training.config import DEFAULT_STEPS, RECIPE_FILE, BaseRunConfig, Run, RunConfig, differences
from redraft.training.launch import check_division
from redraft.training.loop import KeyedTrainer
from redraft.training.machine import bfloat16_is_faster, keep_freed_memory, runs_on_cpu
from redraft.training.output import lasting_output, say
from redraft.training.pace import Pacer
from redraft.training.plan import Clock
from redraft.training.preference import PreferenceTrainer
from redraft.training.start import build_denoiser, load_start
from redraft.training.trainer import DiffusionTrainer, spread
from redraft.training.verdict import RunResult, announce, divergence, draw_curve, weight_norm, worse_than_chance


def run(
    config: RunConfig, *, resume: bool = False, console: Console | None = None, clock: Clock | None = None
) -> RunResult:
    """Train, evaluate and save. Raises ValueError for every mistake that can be known before the first step.

    `train.max_minutes` count from the start of `clock`, by default from this call.
    """
    clock = clock or Clock()
    with alone(config):
        return _run(config, resume=resume, console=console or Console(), clock=clock)


def _run(config: RunConfig, *, resume: bool, console: Console, clock: Clock) -> RunResult:
    config, checkpoint = begin(config, resume=resume, console=console)
    start = load_start(config)
    data = prepare(config.data, tokenizer=None if start is None else start.tokenizer, objective=config.objective.kind)
    console = console if PartialState().is_main_process else Console(quiet=True)
    _announce_data(data, config, console)
    config = _with_steps(config, data)

    torch.manual_seed(config.train.seed)
    denoiser = build_denoiser(config, start, tokenizer=data.tokenizer)
    if data.generation:
        denoiser.model.config.generation = data.generation
    elif start is None and not denoiser.settings.is_autoregressive:
        denoiser.model.config.generation = dict(process_class(denoiser.settings.process).varied_sampling)
    if checkpoint:
        check_identity(Path(checkpoint), {"diffusion": denoiser.settings.saved()})
    num_trained, num_all = num_parameters(denoiser.model)
    check_disk(config, num_trained)
    size = f"trains {num_trained / 1e6:.2f} M of {num_all / 1e6:.2f} M parameters"
    say(console, f"model: {config.model.start or config.model.architecture}, {size}")
    kind = PreferenceTrainer if config.data.kind == "preference" else DiffusionTrainer
    trainer = kind(config, data, denoiser)
    pacer = Pacer(trainer, config.train, clock=clock, console=console)
    result = drive(config, pacer, checkpoint=checkpoint)
    return result if result.signal else _finish(result, trainer, data, pacer, config)


@contextmanager
def alone(config: BaseRunConfig) -> Iterator[None]:
    """Lock the folder of a run, and ignore errors of its console output."""
    state = PartialState(cpu=runs_on_cpu())
    lock = one_writer(Path(config.out)) if state.is_main_process else nullcontext()
    with lasting_output(), lock:
        yield


def begin(config: Run, *, resume: bool, console: Console) -> tuple[Run, str | None]:
    """Resolve the configuration, and the checkpoint to continue from. Raises ValueError where the folder does not fit.

    The caller has locked the folder (`alone`).
    """
    folder, state = Path(config.out), PartialState()
    config = _with_saved_settings(config) if resume else _with_precision(config)
    check_division(config.train.batch_size, state.num_processes)
    if not resume and ((folder / RECIPE_FILE).exists() or (folder / "config.json").exists()):
        raise ValueError(f"{folder} holds a run. Continue it with --resume, or choose another --out.")
    _quiet_libraries()
    if not resume:
        return config, None
    console = console if state.is_main_process else Console(quiet=True)
    (checkpoint,) = broadcast_object_list([last_whole_checkpoint(folder, console)])
    if checkpoint:
        check_identity(Path(checkpoint), config.identity())
    start = f"step {step_of(checkpoint)}" if checkpoint else "the beginning, as there is no checkpoint"
    say(console, f"continuing from {start}")
    return config, checkpoint


def drive(config: Run, pacer: Pacer, *, checkpoint: str | None) -> RunResult:
    """Run the loop from its start or a checkpoint, to its end or to a signal, and say how to continue."""
    trainer = pacer.trainer
    folder, is_main, console = Path(config.out), trainer.is_world_process_zero(), pacer.console
    progress, log, stop = ProgressLines(console, trainer.legend), LogFile(folder), GracefulStop(console)
    for callback in (pacer, progress, log, stop):
        trainer.add_callback(callback)
    keep_freed_memory()
    pacer.resume(checkpoint) if checkpoint else pacer.begin()
    config = _as_planned(config, trainer)
    trainer.accelerator.wait_for_everyone()  # all processes have checked the folder before one writes to it
    if is_main:
        with explain_disk_errors(RECIPE_FILE, folder):
            folder.mkdir(parents=True, exist_ok=True)
            config.save(folder)
            trainer.tokenizer.save_pretrained(folder)
    if trainer.average and checkpoint:
        trainer.average.load(Path(checkpoint))
    norm_before = weight_norm(trainer.model)
    if checkpoint and step_of(checkpoint) >= trainer.plan.end:  # stopped between its last step and its end
        trainer._load_from_checkpoint(checkpoint)
        saved = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        trainer.state.global_step, trainer.state.epoch = saved.global_step, saved.epoch
        trainer.state.log_history = saved.log_history
        log.on_train_begin(trainer.args, trainer.state, trainer.control)
    else:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            progress.close()
            stop.restore()
    steps = trainer.state.global_step
    if stop.received:
        say(console, f"stopped at step {steps}. To continue: {config.resume_command}")
        if isinstance(config, RunConfig):  # the checkpoints of latent stages are no whole models
            say(console, f"To use it as it is: redraft sample {shlex.quote(f'{folder}/checkpoint-{steps}')} 'A prompt'")
    elif is_main:
        with explain_disk_errors(RECIPE_FILE, folder):
            _as_planned(config, trainer).save(folder)
        tidy(folder, step=steps, keep=config.train.max_checkpoints)
    diverged = divergence(trainer.state.log_history, norm_before=norm_before, norm=weight_norm(trainer.model))
    return RunResult(folder=folder, steps=steps, diverged=diverged, signal=stop.received)


def _as_planned(config: Run, trainer: KeyedTrainer) -> Run:
    """Return the configuration with the steps that the run has in its time."""
    return replace(config, train=replace(config.train, max_steps=trainer.plan.end))


def _with_precision(config: Run) -> Run:
    """Resolve the precision once for all processes and for every resume: it is decided by a measurement."""
    if config.train.precision != "auto":
        return config
    (chosen,) = broadcast_object_list(["bfloat16" if bfloat16_is_faster() else "float32"])
    return replace(config, train=replace(config.train, precision=chosen))


def _with_steps(config: RunConfig, data: PreparedData) -> RunConfig:
    """Turn epochs into steps, rounded up. The last, partial batch of an epoch is no step.

    Raises ValueError for a stream, whose length is not known.
    """
    train = config.train
    if train.epochs is None:
        return config
    if isinstance(data.train, StreamedWindows):
        raise ValueError(f"train.epochs needs the length of the data; got {train.epochs} and a stream. Use max_steps.")
    steps = math.ceil(train.epochs * (len(data.train) // (train.batch_size * train.accumulation)))
    return replace(config, train=replace(train, epochs=None, max_steps=steps))


def _with_saved_settings(config: Run) -> Run:
    """Return the configuration of the run in the folder. Raises ValueError where another one is asked for."""
    path = Path(config.out) / RECIPE_FILE
    if not path.exists():
        raise ValueError(f"{config.out} holds no run to resume. Leave out --resume to start one.")
    saved = type(config).read(path, is_whole=True)
    train, before = config.train, saved.train
    longer: dict[str, Any] = {}
    if (train.max_minutes or math.inf) > (before.max_minutes or 0):  # None: no limit
        longer["max_minutes"] = train.max_minutes
    if train.epochs:
        longer |= {"epochs": train.epochs, "max_steps": DEFAULT_STEPS}
    elif train.max_steps > before.max_steps:
        longer["max_steps"] = train.max_steps
    resolved = {  # by the data, a measurement of a step, a measurement of the machine
        "train.max_steps:": train.epochs or before.max_minutes,
        "train.precision:": train.precision == "auto",
    }
    allowed = [f"train.{name}:" for name in longer] + [name for name, is_known in resolved.items() if is_known]
    changed = [change for change in differences(saved, config) if not change.startswith(("out:", *allowed))]
    if changed:
        raise ValueError(
            f"--resume continues {config.out} as it was saved, or for longer (a larger --train.max-steps or "
            f"--train.max-minutes), but these settings differ: {'; '.join(changed)}. Leave them out, or start a new "
            "run with another --out."
        )
    return replace(saved, out=config.out, train=replace(before, **longer))


def check_disk(config: BaseRunConfig, num_trained: int) -> None:
    """Raise ValueError where the checkpoints of the run cannot fit."""
    out = Path(config.out)
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    keep = config.train.max_checkpoints
    needed = num_trained * (12 * (keep + 1) + 4)  # bytes: float32 weights with AdamW's two moments; weights alone
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"the checkpoints of this run need {needed / 1e6:,.1f} MB and {existing} has {free / 1e6:,.1f} MB free. "
            "Free some, choose another --out, or lower --train.max-checkpoints."
        )


def _announce_data(data: PreparedData, config: RunConfig, console: Console) -> None:
    """Print the size of the data. Raises ValueError where they do not fill one step."""
    for name, report in (("train", data.train_report), ("validation", data.validation_report)):
        if report is not None:  # a stream is not read yet
            say(console, f"{name}: {report.describe(seq_len=config.data.seq_len)}")
    if config.data.max_documents is not None:
        say(console, f"no more than the first {config.data.max_documents} documents are used (--data.max-documents)")
    rows = config.train.batch_size * config.train.accumulation
    if not isinstance(data.train, StreamedWindows) and len(data.train) < rows:
        raise ValueError(
            f"the corpus fills {len(data.train)} rows, fewer than the {rows} of one step (batch_size x accumulation). "
            "Lower --train.batch-size or --data.seq-len, or give more data."
        )


def _finish(
    result: RunResult, trainer: DiffusionTrainer, data: PreparedData, pacer: Pacer, config: RunConfig
) -> RunResult:
    """Save the model, evaluate on the validation windows, draw the curve."""
    save_model(trainer, result.folder)
    measure, vocab_size, console = config.objective.measure, len(data.tokenizer), pacer.console
    if len(data.validation):
        windows = trainer.eval_dataset = spread(data.validation, pacer.affordable_windows())
        metrics = trainer.evaluate()
        if "eval_nats_per_token" in metrics:
            estimate = Estimate(
                nats_per_token=metrics["eval_nats_per_token"],
                standard_error=metrics["eval_standard_error"],
                bits_per_byte=metrics.get("eval_bits_per_byte"),
            )
            diverged = worse_than_chance(estimate, chance=math.log(vocab_size), measure=measure)
            result = replace(result, validation=estimate, diverged=result.diverged or diverged)
        if config.data.kind == "text":  # in conversations only the answers are learnt, so nothing compares with them
            unigram, gzip = unigram_nats(windows, vocab_size=vocab_size), gzip_bits_per_byte(windows, data.tokenizer)
            result = replace(result, unigram_nats=unigram, gzip_bits_per_byte=gzip)
    if trainer.is_world_process_zero():
        draw_curve(trainer.state.log_history, config, console=console)
        announce(result, console, measure=measure, on=trainer.describe_windows(len(data.validation)))
    return result


def save_model(trainer: Any, folder: Path) -> None:
    """Write the model into a staging folder and move it, the weights last: a folder with weights is complete."""
    staging = folder / ".model"
    swapped = trainer.average.swapped_in() if trainer.average else nullcontext()
    with swapped, explain_disk_errors("the model", folder):
        trainer.save_model(str(staging))
        if trainer.is_world_process_zero():
            (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle of the settings in recipe.json
            for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".safetensors"):
                path.replace(folder / path.name)
            staging.rmdir()
    trainer.accelerator.wait_for_everyone()


def _quiet_libraries() -> None:
    """Switch off the libraries' progress bars; warnings of transformers are still shown."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
