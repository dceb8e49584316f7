"""`redraft train RECIPE`: one run from data to checkpoint."""

import argparse
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from redraft.cli.parsing import parse
from redraft.data.config import GRIDS
from redraft.errors import unknown_name
from redraft.latent.config import WORDS, LatentRunConfig
from redraft.models.config import ModelConfig
from redraft.recipes import RECIPES
from redraft.recipes.smoke import smoke
from redraft.training.config import RECIPE_FILE, RunConfig, read_recipe
from redraft.training.plan import Clock

USAGE = """usage: redraft train RECIPE [--resume] [--smoke] [--launch KIND --processes N] [--SECTION.NAME VALUE ...]

RECIPE is a name below, a recipe.json, or the folder of a run.
`redraft train RECIPE --help` lists the settings with their defaults and units."""
MODES = """--resume continues the run in --out from its last checkpoint. With a larger --train.max-steps or
--train.max-minutes (which count all of the run) it trains for longer: after the end of a finished run
the learning rate warms up again and falls to its end; that of a stopped run falls more slowly.
--smoke runs the recipe in seconds, offline: its own objective, but a tiny random model, tiny data and 3 steps.
--launch ddp|fsdp2|deepspeed --processes N trains in N processes on this machine; they divide each batch."""


def main(arguments: list[str]) -> int:
    """Resolve the recipe and its flags, train, and print the result; return 1 for a run that diverged."""
    clock = Clock()
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<20}{default_doc(name).splitlines()[0]}" for name in RECIPES]
        print(USAGE, MODES, "", *lines, sep="\n")
        return 0
    name, *flags = arguments
    mode, flags = _take_mode(flags)
    default = smoke(_find(name)) if mode.smoke else _find(name)
    if isinstance(default, RunConfig) and re.search(r"--model\.start[ =](?!None)", " ".join(flags)):
        without_shape = ModelConfig(start=default.model.start)  # a shape given as flags is an error
        default = replace(default, model=without_shape)
    if "-h" in flags or "--help" in flags:
        print(f"{default_doc(name)}\n\n{MODES}\n")
    config: Any = parse(type(default), flags, command=f"train {name}", default=default)
    if mode.launch or mode.processes:
        same_mode = [f"--{flag}" for flag in ("resume", "smoke") if getattr(mode, flag)]
        return _launch(mode.launch, mode.processes, config, [name, *same_mode, *flags])
    return _train(config, resume=mode.resume, clock=clock)


def _take_mode(flags: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate the flags that are no settings from the others. Raises ValueError where they cannot be read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--launch")
    parser.add_argument("--processes", type=int)
    try:
        return parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}. See --help.") from error


def _train(config: RunConfig | LatentRunConfig, *, resume: bool, clock: Clock) -> int:
    from redraft.models.later import import_modelling

    import_modelling()
    from redraft.training.output import lasting_output

    train: Any
    if isinstance(config, LatentRunConfig):
        from redraft.latent.stages import run_stage as train
    else:
        from redraft.training.run import run as train  # heavy: transformers' trainer
    with lasting_output():
        result = train(config, resume=resume, clock=clock)
        if not (result.signal or result.diverged):
            print("try next:", *(f"  {step}" for step in next_steps(config)), sep="\n")
            print("train it twice as long:", f"  {longer_command(config, steps=result.steps)}", sep="\n")
    return 128 + result.signal if result.signal else int(result.diverged is not None)


def _launch(kind: str | None, processes: int | None, config: Any, arguments: list[str]) -> int:
    """Start the command again in several processes. Raises ValueError for mistakes that are known before the start."""
    from redraft.training.launch import check_launch, launch

    if kind is None or processes is None:
        raise ValueError(f"--launch and --processes go together; got {kind} and {processes}. Add the other one.")
    if isinstance(config, LatentRunConfig):
        raise ValueError(f"latent stages train in one process; got --launch {kind}. Leave it out.")
    check_launch(kind, processes, batch_size=config.train.batch_size)
    return launch(kind, processes, ["train", *arguments])


def next_steps(config: RunConfig | LatentRunConfig) -> list[str]:
    """Name commands to try on the trained model; they fit its data, its task and its process."""
    folder = shlex.quote(config.out)
    if isinstance(config, LatentRunConfig):
        return _after_stage(config, folder)
    data, kind = config.data, config.objective.kind
    if data.kind == WORDS:
        task = shlex.quote(f"thought:{data.source}")
        return [f"redraft eval {folder} --tasks {task} --batch-size 100 --out {folder}/eval"]
    if data.kind == GRIDS:
        return [f"redraft infill {folder} '___2 _2_1 _12_ _4__'"]
    if data.kind in ("chat", "preference"):
        return [f"redraft chat {folder}"]
    begun, holed = "'The beginning of a text like those of training'", "'A text with a [MASK:8] to fill.'"
    if data.source == "stdlib":
        begun, holed = r"$'import os\n\ndef '", r"$'def is_even(n):\n    return [MASK:8]\n'"
    steps = [f"redraft sample {folder} {begun} --trace {folder}/trace.html"]
    if kind != "ar":  # an autoregressive model does not see the text after a hole
        steps.append(f"redraft infill {folder} {holed}")
    if (Path(config.out) / "chat_template.jinja").exists():  # it came with model.start
        steps.append(f"redraft chat {folder}")
    return steps


def longer_command(config: RunConfig | LatentRunConfig, *, steps: int) -> str:
    """Name the command that trains a finished run for as long again."""
    minutes = config.train.max_minutes
    limit = f"--train.max-minutes {2 * minutes:g}" if minutes else f"--train.max-steps {2 * steps}"
    return f"{config.resume_command} {limit}"


def _after_stage(config: LatentRunConfig, folder: str) -> list[str]:
    task = shlex.quote(str(config.task))
    if config.stage == "autoencoder":
        return [f"redraft think --check {folder}", f"redraft train latent-denoiser --start {folder} --task {task}"]
    from redraft.latent.tasks import find_task

    prompt = next(iter(find_task(str(config.task)).examples())).prompt
    rollout = f"redraft train latent-rollout --start {folder} --task {task}"
    return [f"redraft think {folder} {shlex.quote(prompt)} --show", *([rollout] if config.stage == "denoiser" else [])]


def default_doc(name: str) -> str:
    """First paragraph of a recipe's docstring."""
    recipe = RECIPES.get(name)
    return ((recipe.__doc__ or "") if recipe else f"the run saved in {name}").strip()


def _find(name: str) -> RunConfig | LatentRunConfig:
    """Read a recipe by its name, its file, or the folder of a run."""
    if name in RECIPES:
        return RECIPES[name]()  # type: ignore[return-value]
    path = Path(name)
    if path.is_dir() and not (path / RECIPE_FILE).exists():
        raise ValueError(f"{path} is not a run: it has no {RECIPE_FILE}. The recipes are {', '.join(RECIPES)}.")
    if not path.is_dir() and path.suffix != ".json":
        raise unknown_name("recipe", name, RECIPES)
    file = path / RECIPE_FILE if path.is_dir() else path
    kind: type[Any] = LatentRunConfig if "stage" in read_recipe(file) else RunConfig
    config: RunConfig | LatentRunConfig = kind.read(file)
    return replace(config, out=str(path)) if path.is_dir() else config
