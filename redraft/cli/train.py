"""`redraft train RECIPE`: one run from data to checkpoint."""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from redraft.cli.parsing import parse
from redraft.errors import unknown_name
from redraft.latent.config import WORDS, LatentRunConfig
from redraft.models.build import ModelConfig
from redraft.recipes import RECIPES
from redraft.recipes.smoke import smoke
from redraft.training.config import RECIPE_FILE, RunConfig, TrainConfig, read_recipe

SMOKE = "--smoke runs it in seconds, offline: a tiny random model, tiny data, 3 steps; the objective as it is."
LAUNCH = "--launch ddp|fsdp2|deepspeed --processes N trains in N processes here, which share the batch."


def main(arguments: list[str]) -> int:
    """Resolve the recipe and its flags, train, and say what came out; 1 for a run that diverged."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *flags = arguments
    resume = "--resume" in flags
    is_smoke = "--smoke" in flags
    (kind_of_launch, flags), given = _take("--launch", flags), flags
    processes, flags = _take("--processes", flags)
    flags = [flag for flag in flags if flag not in ("--resume", "--smoke")]
    default = smoke(_find(name)) if is_smoke else _find(name)
    if isinstance(default, RunConfig) and re.search(r"--model\.start[ =](?!None)", " ".join(flags)):
        default = replace(default, model=ModelConfig())  # the recipe's shape gives way; one asked for is refused
    if "-h" in flags or "--help" in flags:
        about = "--resume goes on with the run in --out from its last checkpoint."
        print(f"{default_doc(name)}\n\n{about}\n{SMOKE}\n{LAUNCH}\n")
    kind: type[Any] = type(default)
    config = parse(kind, flags, command=f"train {name}", default=default)
    _check_length(config.train, default.train)
    if kind_of_launch or processes:
        without = [name, *_take("--processes", _take("--launch", given)[1])[1]]
        return _launch(kind_of_launch, processes, config, without)
    from redraft.training.output import lasting_output

    with lasting_output():
        return _train(config, resume=resume)


def _train(config: RunConfig | LatentRunConfig, *, resume: bool) -> int:
    from redraft.cli.common import plain_console

    console = plain_console()
    if isinstance(config, LatentRunConfig):
        from redraft.latent.stages import run_stage

        outcome = run_stage(config, resume=resume, console=console)
    else:
        from redraft.training.run import run  # heavy: transformers' trainer

        outcome = run(config, resume=resume, console=console)
    if outcome.signal:
        return 128 + outcome.signal
    if outcome.diverged:
        return 1
    for line in ["try next:", *(f"  {step}" for step in next_steps(config))]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _check_length(train: TrainConfig, default: TrainConfig) -> None:
    """Raise ValueError where steps are asked for beside epochs, which go before them."""
    if train.epochs is not None and train.max_steps != default.max_steps:
        raise ValueError(
            f"train.epochs {train.epochs:g} decides the number of steps; got train.max_steps {train.max_steps} beside "
            "it. Add --train.epochs None to count in steps."
        )


def _launch(kind: str | None, wished: str | None, config: Any, arguments: list[str]) -> int:
    """Start the command again in several processes. Raises ValueError for what can be known to fail."""
    from redraft.training.launch import check_launch, launch

    if kind is None:
        raise ValueError(f"--processes goes with --launch; got {wished} alone. Add --launch ddp or fsdp2.")
    if wished is None or not wished.lstrip("-").isdigit():
        raise ValueError(f"--launch needs --processes and a number, e.g. 8; got {wished}.")
    if isinstance(config, LatentRunConfig):
        raise ValueError(f"latent stages train in one process; got --launch {kind}. Leave it out.")
    check_launch(kind, int(wished), batch_size=config.train.batch_size)
    code, reason = launch(kind, int(wished), ["train", *arguments])
    if reason:
        print(f"redraft train: {reason}", file=sys.stderr)
    return code


def _take(name: str, flags: list[str]) -> tuple[str | None, list[str]]:
    """Take a flag and its value out of the others, in either spelling."""
    for i, flag in enumerate(flags):
        if flag == name and i + 1 < len(flags):
            return flags[i + 1], flags[:i] + flags[i + 2 :]
        if flag == name or flag.startswith(f"{name}="):
            return flag.removeprefix(name).removeprefix("="), flags[:i] + flags[i + 1 :]
    return None, flags


def next_steps(config: RunConfig | LatentRunConfig) -> list[str]:
    """Name commands to try on what was trained, that fit its data, its task and its process."""
    folder = shlex.quote(config.out)
    if isinstance(config, LatentRunConfig):
        return _after_stage(config, folder)
    data, kind = config.data, config.objective.kind
    if data.kind == WORDS:
        task = shlex.quote(f"thought:{data.source}")
        return [f"redraft eval {folder} --tasks {task} --batch-size 100 --out {folder}/eval"]
    if data.kind in ("chat", "preference"):
        return [f"redraft chat {folder}"]
    begun, holed = "'The beginning of a text like those of training'", "'A text with a [MASK:8] to fill.'"
    if data.source == "stdlib":
        begun, holed = r"$'import os\n\ndef '", r"$'def is_even(n):\n    return [MASK:8]\n'"
    steps = [f"redraft sample {folder} {begun} --trace {folder}/trace.html"]
    if kind != "ar":  # it does not see what is behind the hole
        steps.append(f"redraft infill {folder} {holed}")
    if (Path(config.out) / "chat_template.jinja").exists():  # of model.start
        steps.append(f"redraft chat {folder}")
    return steps


def _after_stage(config: LatentRunConfig, folder: str) -> list[str]:
    task = shlex.quote(str(config.task))
    if config.stage == "autoencoder":
        return [f"redraft think --check {folder}", f"redraft train latent-denoiser --start {folder} --task {task}"]
    from redraft.latent.tasks import find_task

    prompt = next(iter(find_task(str(config.task)).examples())).prompt
    steps = [f"redraft think {folder} {shlex.quote(prompt)} --show"]
    if config.stage == "denoiser":
        steps.append(f"redraft train latent-rollout --start {folder} --task {task}")
    return steps


def default_doc(name: str) -> str:
    """First paragraph of a recipe's docstring."""
    recipe = RECIPES.get(name)
    return ((recipe.__doc__ or "") if recipe else f"the run saved in {name}").strip()


def _find(name: str) -> RunConfig | LatentRunConfig:
    """Read a recipe by its name, its file, or the folder of a run."""
    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if path.is_dir():
        if not (path / RECIPE_FILE).exists():
            raise ValueError(f"{path} holds no {RECIPE_FILE}, so it is not a run to continue. {_known()}")
        return replace(_read(path / RECIPE_FILE), out=str(path))
    if path.suffix == ".json":
        return _read(path)
    raise unknown_name("recipe", name, RECIPES)


def _read(path: Path) -> RunConfig | LatentRunConfig:
    kind: type[Any] = LatentRunConfig if "stage" in read_recipe(path) else RunConfig
    return kind.read(path)


def _known() -> str:
    return f"The recipes are {', '.join(RECIPES)}."


def _help() -> str:
    width = max(map(len, RECIPES))
    lines = [f"  {name:<{width}}  {default_doc(name).splitlines()[0]}" for name in RECIPES]
    return "\n".join(
        [
            "usage: redraft train RECIPE [--resume] [--smoke] [--launch KIND --processes N] [--SECTION.NAME VALUE ...]",
            "",
            "RECIPE is a name below, a recipe.json, or the folder of a run.",
            "`redraft train RECIPE --help` lists the settings with their defaults and units.",
            SMOKE,
            LAUNCH,
            "",
            *lines,
        ]
    )
