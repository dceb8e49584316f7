"""Tasks of latent thinking: generators of worked examples, and verifiers independent of them. No torch."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from redraft.data.sources import Split, split_of
from redraft.errors import unknown_name
from redraft.latent.tasks.composition import Composition
from redraft.latent.tasks.countdown import Countdown
from redraft.latent.tasks.sudoku import Sudoku
from redraft.latent.tasks.worked import WorkedExample

__all__ = ["TASKS", "ExampleFile", "ThoughtTask", "WorkedExample", "find_task", "held_out_prompts", "side_of"]


@runtime_checkable
class ThoughtTask(Protocol):
    """A task. Prompts, blocks of thought and answers are words separated by spaces."""

    @property
    def held_out(self) -> float:
        """Share of the prompts held out, chosen by the hash of their text."""
        ...

    def examples(self) -> Iterator[WorkedExample]: ...
    def answer(self, blocks: list[str]) -> str: ...
    def is_solved(self, prompt: str, answer: str) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class ExampleFile:
    """A .jsonl of {"prompt": str, "blocks": [str, ...], "answer": str}.

    A prompt is solved by any answer that the file has for it, or, where it has none, by its thoughts.
    """

    path: Path
    held_out: float = 0.1
    read: Callable[[str], str] = lambda text: " ".join(text.split())
    """Normalises texts before they are compared; for a lossy tokenizer, its decoding of the text."""

    def examples(self) -> Iterator[WorkedExample]:
        """Read the file. Raises ValueError with the number of a line that does not fit, and for an empty file."""
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")  # U+2028 may stand within a line of JSON
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8: {error}. Save it as UTF-8.") from error
        if not lines[-1]:
            lines.pop()
        if not lines:
            raise ValueError(f"{self.path} is empty. Write one example per line.")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                prompt, blocks, answer = row["prompt"], row["blocks"], row.get("answer", "")
                is_right = isinstance(blocks, list) and len(blocks) > 0 and isinstance(answer, str)
                is_right = is_right and all(text.strip() for text in (prompt, *blocks))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                is_right = False
            if not is_right:
                wanted = '{"prompt": str, "blocks": [str, ...], "answer": str}, prompt and blocks not empty'
                raise ValueError(f"{self.path}, line {number}: must be {wanted}; got {line[:60]!r}.")
            yield WorkedExample(prompt=prompt, blocks=tuple(blocks), answer=answer)

    def answer(self, blocks: list[str]) -> str:
        """Join the thoughts: a file does not say how an answer follows from them."""
        return " ".join(blocks)

    def is_solved(self, prompt: str, answer: str) -> bool:
        """Look the prompt up."""
        return self.read(answer) in self._answers.get(prompt, ())

    @cached_property
    def _answers(self) -> dict[str, set[str]]:
        answers: dict[str, set[str]] = {}
        for example in self.examples():
            text = example.answer or self.answer(list(example.blocks))
            answers.setdefault(example.prompt, set()).add(self.read(text))
        return answers


TASKS: dict[str, ThoughtTask] = {
    "countdown": Countdown(),
    "composition": Composition(),
    "sudoku": Sudoku(),
    "sudoku-multi": Sudoku(clues=(3, 4), is_unique=False),
}


def find_task(name: str) -> ThoughtTask:
    """Return a task by its name, or the one that a .jsonl file holds."""
    if name in TASKS:
        return TASKS[name]
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise ValueError(f"there is no file {name}. Give a .jsonl of examples, or one of {', '.join(TASKS)}.")
        return ExampleFile(path=Path(name))
    raise unknown_name("task", name, [*TASKS, "FILE.jsonl"])


def side_of(prompt: str, *, held_out: float) -> Split:
    """Choose a prompt's side of a task's split by the hash of its words, whatever the spaces between them."""
    return split_of(" ".join(prompt.split()), validation_fraction=held_out)


def held_out_prompts(task: ThoughtTask) -> list[str]:
    """Return the distinct prompts that training never sees, in the task's order."""
    prompts = dict.fromkeys(example.prompt for example in task.examples())
    return [p for p in prompts if side_of(p, held_out=task.held_out) == "validation"]
