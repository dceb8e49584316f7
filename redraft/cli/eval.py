"""`redraft eval MODEL --tasks ...`: measure a model; an interrupted evaluation goes on where it stopped."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from redraft.cli.parsing import LoadingFlags, SamplingFlags, parse
from redraft.evaluation.tasks import NAMED, TaskOptions, is_offline_task, make_task, require
from redraft.folders import one_writer
from redraft.likelihood.requests import LikelihoodConfig

if TYPE_CHECKING:
    from redraft.evaluation.run import Store, Summary
    from redraft.evaluation.suites import SuiteTask
    from redraft.language_model import LanguageModel

NO_SETTINGS = ("out", "device", "processes")  # what changes no result: the same folder may go on with others


@dataclass(frozen=True, kw_only=True)
class Arguments(LoadingFlags):
    """Measure a model on tasks.

    Offline tasks: countdown, sudoku, arithmetic, logic, reasoning-gym:NAME, humaneval, infill-stdlib, perplexity:SOURCE
    (stdlib, a file, a folder), thought:NAME (a task of latent thinking, for a model that writes its thoughts;
    thought:NAME:pause and the like for another form than written) and FILE.jsonl; any other name is a task of
    lm-evaluation-harness.
    """

    model: tyro.conf.Positional[str]
    """Folder or hub id of a model."""
    tasks: tuple[str, ...] = ()
    """Tasks to run."""
    suite: str | None = None
    """Published settings: llada-instruct, llada-base, dream-instruct, tiny-a2d-mdlm, tiny-a2d-bd3lm, bert-chat."""
    out: Path = Path("runs/eval")
    """Folder of the results; the same command goes on with what it holds."""
    sweep_steps: tuple[int, ...] = ()
    """Evaluate with each of these numbers of steps, in OUT/steps-N, and plot the scores against steps and forwards."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    """How to generate; what is said here wins over the checkpoint's and a harness task's own settings."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """How to estimate likelihoods."""
    items: TaskOptions = field(default_factory=TaskOptions)
    """Which items, and whether generated code may run."""
    chat: bool = False
    """Put prompts into the model's chat template."""
    few_shot: int | None = None
    """Examples before each question of a harness task; by default the task's own number."""
    include_path: Path | None = None
    """Folder with harness tasks of your own (YAML)."""
    batch_size: int = 8
    """Items worked on together (of each, --num-samples rows)."""
    processes: int = 1
    """Processes that share the items, on the GPUs of this machine or its processors."""


def main(arguments: list[str]) -> int:
    """Parse, run, report."""
    args = parse(Arguments, arguments, command="eval")
    if not args.tasks and args.suite is None:
        raise ValueError(f"name what to run: --tasks {', '.join(NAMED)}, a task of the harness, or --suite.")

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1; got {args.batch_size}.")
    if min(args.sweep_steps, default=1) < 1:
        raise ValueError(f"--sweep-steps are numbers of at least 1; got {min(args.sweep_steps)}.")

    sampling = args.sampling.given(arguments)
    if args.processes != 1:
        return _launch(args, arguments)
    if args.sweep_steps:
        return _sweep(args, sampling)
    return _run(args, sampling)


def _sweep(args: Arguments, sampling: dict[str, Any]) -> int:
    """Evaluate with several numbers of steps, one after the other, and draw what they cost and give."""
    from redraft.evaluation.report import plot_frontier, provenance

    for name in ("steps", "steps_per_block", "budget", "forwards"):
        if name in sampling:
            raise ValueError(f"--sweep-steps chooses the steps; got --{name.replace('_', '-')}. Leave it out.")
    folders = [args.out / f"steps-{steps}" for steps in args.sweep_steps]
    for steps, folder in zip(args.sweep_steps, folders, strict=True):
        chosen = replace(args.sampling, steps=steps)
        _run(replace(args, out=folder, sampling=chosen, sweep_steps=()), sampling | {"steps": steps})
    if find_spec("matplotlib") and (folders[0] / "results.json").exists():
        plot_frontier(args.out / "steps.png", folders, provenance({"sampling": args.sampling.seed}))
    return 0


def _run(args: Arguments, sampling: dict[str, Any]) -> int:
    """Evaluate in this process."""
    from redraft.cli.common import load_quietly
    from redraft.evaluation.report import provenance, write_report
    from redraft.evaluation.run import Store, join_processes, summarize
    from redraft.evaluation.suites import SuiteTask, find_suite

    suite = find_suite(args.suite) if args.suite else None
    offline = [make_task(name, args.items) for name in args.tasks if is_offline_task(name)]
    asked = [SuiteTask(name=name, few_shot=-1) for name in args.tasks if not is_offline_task(name)]
    asked += suite.tasks if suite else ()
    if asked and sampling.get("num_samples", 1) > 1:
        raise ValueError(
            f"--num-samples is for the offline tasks; {asked[0].name} is the harness' own. Say `repeats` in its YAML."
        )
    manager = _task_manager(args, [task.name for task in asked]) if asked else None
    state = join_processes(args.device)
    device = args.device or (str(state.device) if state.num_processes > 1 else None)
    lm = load_quietly(args.model, device=device, quantization=args.quantization)
    is_main = state.is_main_process
    store = Store(folder=args.out, rank=state.process_index)
    with one_writer(args.out) if is_main else nullcontext():
        store.open({name: value for name, value in asdict(args).items() if name not in NO_SETTINGS})
        _run_offline(args, sampling, lm, offline, store, world_size=state.num_processes)
        state.wait_for_everyone()  # before the first process sums up what all of them wrote
        summaries = [summarize(t.name, list(store.records(t.name).values())) for t in offline] if is_main else []
        notes = [suite.note] if suite else []
        for task in asked:
            summaries += _run_harness(args, sampling, lm, task, manager, store, chat=suite.chat if suite else args.chat)
            if task.dllm is not None:
                published = f"published {task.official or '-'} (official), {task.dllm} (dLLM), in percent"
                notes.append(f"{task.name}: {published}")
        if is_main:
            seeds = {"sampling": args.sampling.seed, "masks": args.likelihood.seed, "items": args.items.seed}
            write_report(args.out, summaries, provenance(seeds), notes=notes)
    if is_main:
        print((args.out / "report.md").read_text())
    return 0


def _launch(args: Arguments, arguments: list[str]) -> int:
    """Start the command again in several processes. Raises ValueError for a number that is none."""
    from redraft.training.launch import launch

    if args.processes < 1:
        raise ValueError(f"--processes must be at least 1; got {args.processes}.")
    go_on = f"The same command goes on with what is in {args.out}"
    code, reason = launch("ddp", args.processes, ["eval", *arguments, "--processes", "1"], go_on=go_on)
    if reason:
        print(f"redraft eval: {reason}", file=sys.stderr)
    return code


def _run_offline(
    args: Arguments,
    sampling: dict[str, Any],
    lm: "LanguageModel",
    tasks: Sequence[Any],
    store: "Store",
    *,
    world_size: int,
) -> None:
    from tqdm import tqdm

    from redraft.evaluation.run import RunOptions, run_task

    options = RunOptions(sampling=sampling, likelihood=args.likelihood, batch_size=args.batch_size, chat=args.chat)
    for task in tasks:
        records = run_task(lm, task, store, options, limit=args.items.limit, world_size=world_size)
        for _ in tqdm(records, desc=task.name, disable=None if store.rank == 0 else True):
            pass


def _task_manager(args: Arguments, names: list[str]) -> Any:
    """Read the harness' index of tasks, one's own first: its thousands take seconds. ValueError for an unknown name."""
    import difflib

    require("lm-eval", f"{names[0]!r} is none of the tasks {', '.join(NAMED)}; one of lm-evaluation-harness")
    from lm_eval.tasks import TaskManager

    own = None if args.include_path is None else str(args.include_path)
    if own and set(names) <= set((manager := TaskManager(include_path=own, include_defaults=False)).all_tasks):
        return manager
    manager = TaskManager(include_path=own)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*NAMED, *manager.all_tasks], n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"unknown task {name!r}.{hint} Offline tasks are {', '.join(NAMED)}; `lm-eval ls tasks` lists the "
                "harness' own."
            )
    return manager


def _run_harness(
    args: Arguments,
    sampling: dict[str, Any],
    lm: "LanguageModel",
    task: "SuiteTask",
    manager: Any,
    store: "Store",
    *,
    chat: bool,
) -> "list[Summary]":
    """Run one task through the harness; its answers are cached in the folder as they come, its results kept there."""
    from lm_eval import simple_evaluate

    from redraft.evaluation.harness import RedraftLM, keep_results

    settings = {**_changed(args.likelihood), **sampling, **task.settings}
    model = RedraftLM(lm=lm, batch_size=args.batch_size, **settings)
    results = simple_evaluate(
        model=model,
        tasks=[task.name],
        num_fewshot=args.few_shot if task.few_shot < 0 else task.few_shot,
        limit=args.items.limit,
        apply_chat_template=chat,
        task_manager=manager,
        use_cache=str(store.folder / "answers"),
        confirm_run_unsafe_code=args.items.allow_code,
    )
    return [] if results is None else keep_results(results, store)


def _changed(config: Any) -> dict[str, Any]:
    """List the settings that differ from their defaults."""
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
