"""`redraft eval MODEL --tasks ...`: measure a model; the same command continues an interrupted evaluation."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from redraft.cli.parsing import LoadingFlags, SamplingFlags, TemplateFlags, parse
from redraft.evaluation.tasks import NAMED, TaskOptions, is_offline_task, make_task, require_package
from redraft.folders import one_writer
from redraft.likelihood.config import LikelihoodConfig
from redraft.sampling.config import ALL_COSTS
from redraft.settings import Count

if TYPE_CHECKING:
    from redraft.evaluation.run import Store, Summary
    from redraft.evaluation.suites import SuiteTask
    from redraft.language_model import LanguageModel

NO_SETTINGS = ("out", "device", "processes")  # they change no result, so a continued evaluation may change them


@dataclass(frozen=True, kw_only=True)
class EvalFlags(LoadingFlags, TemplateFlags):
    """Measure a model on tasks.

    Offline tasks: countdown, sudoku, arithmetic, logic, reasoning-gym:NAME, humaneval, infill-stdlib, perplexity:SOURCE
    (stdlib, a file, a folder), thought:NAME (a task of latent thinking, for a model that writes its thoughts as words;
    thought:NAME:direct and thought:NAME:pause for models trained on these forms), grids:SIZE (sudoku puzzles of
    4 x 4 or 9 x 9, for models trained on grids) and FILE.jsonl. Any other name is a task of lm-evaluation-harness.
    suite:NAME runs the tasks that others published for a model, with their settings:
    llada-instruct, llada-base, dream-instruct, tiny-a2d-mdlm, tiny-a2d-bd3lm, bert-chat.
    """

    model: tyro.conf.Positional[str]
    """Folder or hub id of a model, or redraft/NAME (see `redraft models`)."""
    tasks: tuple[str, ...] = ()
    """Tasks to run."""
    out: Path = Path("runs/eval")
    """Folder of the results; the same command continues an interrupted evaluation there."""
    sweep_steps: tuple[Count, ...] = ()
    """Evaluate with each of these numbers of steps, in OUT/steps-N, and plot the scores against steps and forwards."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    """How to generate; these settings win over those of the checkpoint and of a harness task."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """How to estimate likelihoods."""
    items: TaskOptions = field(default_factory=TaskOptions)
    """Which items, and whether generated code may run."""
    few_shot: int | None = None
    """Examples before each question of a harness task; by default the task's own number."""
    include_path: Path | None = None
    """Folder with harness tasks of your own (YAML)."""
    batch_size: Count = 8
    """Items in a batch, each with --num-samples rows."""
    processes: Count = 1
    """Processes that share the items, on the GPUs of this machine or its processors."""


def main(arguments: list[str]) -> int:
    """Parse, run, report."""
    args = parse(EvalFlags, arguments, command="eval")
    if not args.tasks:
        raise ValueError(f"name what to run: --tasks {', '.join(NAMED)}, suite:NAME, or a task of the harness.")
    sampling = args.sampling.given(arguments)
    if args.processes != 1:
        return _launch(args, arguments)
    if args.sweep_steps:
        return _sweep(args, sampling)
    return _run(args, sampling)


def _sweep(args: EvalFlags, sampling: dict[str, Any]) -> int:
    """Evaluate with several numbers of steps, one after the other, and draw what they cost and give."""
    from redraft.evaluation.report import plot_frontier, provenance

    for name in ALL_COSTS:
        if name in sampling:
            raise ValueError(f"--sweep-steps chooses the steps; got --{name.replace('_', '-')}. Leave it out.")
    folders = [args.out / f"steps-{steps}" for steps in args.sweep_steps]
    for steps, folder in zip(args.sweep_steps, folders, strict=True):
        chosen = replace(args.sampling, steps=steps)
        _run(replace(args, out=folder, sampling=chosen, sweep_steps=()), sampling | {"steps": steps})
    if find_spec("matplotlib") and (folders[0] / "results.json").exists():
        plot_frontier(args.out / "steps.png", folders, provenance({"sampling": args.sampling.seed}))
    return 0


def _run(args: EvalFlags, sampling: dict[str, Any]) -> int:
    """Evaluate in this process."""
    from redraft.cli.common import load_quietly
    from redraft.evaluation.report import provenance, write_report
    from redraft.evaluation.run import Store, join_processes, summarize

    offline = [make_task(name, args.items) for name in args.tasks if is_offline_task(name)]
    asked = [task for name in args.tasks if not is_offline_task(name) for task in _harness_tasks(name, args)]
    if asked and sampling.get("num_samples", 1) > 1:
        raise ValueError(
            f"--num-samples is for the offline tasks; {asked[0].name} is the harness' own. Set `repeats` in its YAML."
        )
    manager = _task_manager(args, [task.name for task in asked]) if asked else None
    state = join_processes(args.device)
    device = args.device or (str(state.device) if state.num_processes > 1 else None)
    lm = load_quietly(args.model, device=device, quantization=args.quantization)
    is_main = state.is_main_process
    store = Store(folder=args.out, rank=state.process_index)
    with one_writer(args.out) if is_main else nullcontext():
        store.open({name: value for name, value in asdict(args).items() if name not in NO_SETTINGS})
        _run_offline(args, sampling, lm, offline, store, state.num_processes)
        state.wait_for_everyone()  # before the first process sums up what all of them wrote
        summaries = [summarize(t.name, list(store.records(t.name).values())) for t in offline] if is_main else []
        for task in asked:
            summaries += _run_harness(args, sampling, lm, task, manager, store)
        if is_main:
            seeds = {"sampling": args.sampling.seed, "masks": args.likelihood.seed}
            write_report(args.out, summaries, provenance(seeds), notes=[task.note for task in asked if task.note])
    if is_main:
        print((args.out / "report.md").read_text())
    return 0


def _launch(args: EvalFlags, arguments: list[str]) -> int:
    """Start the command again in several processes."""
    from redraft.training.launch import launch

    go_on = f"The same command continues from the items in {args.out}"
    return launch("ddp", args.processes, ["eval", *arguments, "--processes", "1"], go_on=go_on)


def _run_offline(
    args: EvalFlags,
    sampling: dict[str, Any],
    lm: "LanguageModel",
    tasks: Sequence[Any],
    store: "Store",
    world_size: int,
) -> None:
    from tqdm import tqdm

    from redraft.evaluation.run import Conditions, run_task

    conditions = Conditions(sampling=sampling, likelihood=args.likelihood, batch_size=args.batch_size, chat=args.chat)
    for task in tasks:
        records = run_task(lm, task, store, conditions, limit=args.items.limit, world_size=world_size)
        for _ in tqdm(records, desc=task.name, disable=None if store.rank == 0 else True):
            pass


def _harness_tasks(name: str, args: EvalFlags) -> "list[SuiteTask]":
    """List the harness tasks of a name: those of a suite, or one task under the settings of the command."""
    from redraft.evaluation.suites import SuiteTask, find_suite

    if name.startswith("suite:"):
        return find_suite(name.removeprefix("suite:"))
    return [SuiteTask(name=name, few_shot=args.few_shot, chat=args.chat, settings={})]


def _task_manager(args: EvalFlags, names: list[str]) -> Any:
    """Read the harness' index of tasks; first only the user's folder, since the whole index takes seconds.

    Raises ValueError for an unknown name.
    """
    import difflib

    require_package("lm-eval", f"{names[0]!r} is none of the tasks {', '.join(NAMED)}; one of lm-evaluation-harness")
    from lm_eval.tasks import TaskManager

    folder = None if args.include_path is None else str(args.include_path)
    if folder and set(names) <= set((manager := TaskManager(include_path=folder, include_defaults=False)).all_tasks):
        return manager
    manager = TaskManager(include_path=folder)
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
    args: EvalFlags,
    sampling: dict[str, Any],
    lm: "LanguageModel",
    task: "SuiteTask",
    manager: Any,
    store: "Store",
) -> "list[Summary]":
    """Run one task through the harness; the folder caches each answer at once and gets the results at the end."""
    from lm_eval import simple_evaluate

    from redraft.evaluation.harness import RedraftLM, keep_results

    settings = {**_changed(args.likelihood), **sampling, **task.settings}
    model = RedraftLM(lm=lm, batch_size=args.batch_size, **settings)
    results = simple_evaluate(
        model=model,
        tasks=[task.name],
        num_fewshot=task.few_shot,
        limit=args.items.limit,
        apply_chat_template=task.chat,
        task_manager=manager,
        use_cache=str(store.folder / "answers"),
        confirm_run_unsafe_code=args.items.allow_code,
    )
    return [] if results is None else keep_results(results, store)


def _changed(config: Any) -> dict[str, Any]:
    """List the settings that differ from their defaults."""
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
