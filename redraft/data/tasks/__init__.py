"""Tasks to think about: generators of worked examples, and verifiers that know nothing of the generators."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from redraft.data.sources import Split, split_of
from redraft.data.tasks.composition import Composition
from redraft.data.tasks.countdown import Countdown
from redraft.data.tasks.example import Example
from redraft.data.tasks.sudoku import Sudoku
from redraft.data.tokenizer import EOS, MASK, PAD
from redraft.errors import unknown_name

__all__ = [
    "TASKS",
    "Encoded",
    "Example",
    "ExampleFile",
    "Task",
    "encode",
    "find_task",
    "held_out_prompts",
    "side_of",
    "word_tokenizer",
]

UNKNOWN = "<|unk|>"


@runtime_checkable
class Task(Protocol):
    """Words separated by spaces: a prompt, blocks of thought, an answer made of the thoughts."""

    @property
    def held_out(self) -> float:
        """Share of the prompts held out, chosen by the hash of their text."""
        ...

    def examples(self) -> Iterator[Example]: ...
    def answer(self, blocks: list[str]) -> str: ...
    def is_solved(self, prompt: str, answer: str) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class ExampleFile:
    """A .jsonl of {"prompt": str, "blocks": [str, ...], "answer": str}.

    Solved means: an answer that the file gives to this prompt, or, where it gives none, its thoughts.
    """

    path: Path
    held_out: float = 0.1
    read: Callable[[str], str] = lambda text: " ".join(text.split())
    """What a text is compared by; for a tokenizer that does not keep all of it, what it makes of the text."""

    def examples(self) -> Iterator[Example]:
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
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                prompt = blocks = answer = None
            if not (isinstance(blocks, list) and all(isinstance(text, str) for text in (prompt, answer, *blocks))):
                wanted = '{"prompt": str, "blocks": [str, ...], "answer": str}'
                raise ValueError(f"{self.path}, line {number}: want {wanted}; got {line[:60]!r}.")
            if not blocks or not all(text.strip() for text in (prompt, *blocks)):
                raise ValueError(
                    f"{self.path}, line {number}: there must be a prompt and at least one block of thought, none "
                    f"empty; got {line[:60]!r}."
                )
            yield Example(prompt=prompt, blocks=tuple(blocks), answer=answer)

    def answer(self, blocks: list[str]) -> str:
        """A file says nothing of how an answer follows: the thoughts, joined."""
        return " ".join(blocks)

    def is_solved(self, prompt: str, answer: str) -> bool:
        """Look the prompt up."""
        return self.read(answer) in self._answers.get(prompt, ())

    @cached_property
    def _answers(self) -> dict[str, set[str]]:
        answers: dict[str, set[str]] = {}
        for example in self.examples():
            said = example.answer or self.answer(list(example.blocks))
            answers.setdefault(example.prompt, set()).add(self.read(said))
        return answers


TASKS: dict[str, Task] = {
    "countdown": Countdown(),
    "countdown-backwards": Countdown(is_backwards=True),
    "composition": Composition(),
    "sudoku": Sudoku(),
    "sudoku-multi": Sudoku(clues=(3, 4), is_unique=False),
}


def find_task(name: str) -> Task:
    """Return a task by its name, or the one that a .jsonl file holds."""
    if name in TASKS:
        return TASKS[name]
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise ValueError(f"there is no file {name}. Give a .jsonl of examples, or one of {', '.join(TASKS)}.")
        return ExampleFile(path=Path(name))
    raise unknown_name("task", name, [*TASKS, "FILE.jsonl"])


def side_of(prompt: str, *, held_out: float) -> Split:
    """Put a prompt on one side of a task's split by the hash of its words, whatever the spaces between them."""
    return split_of(" ".join(prompt.split()), validation_fraction=held_out)


def held_out_prompts(task: Task) -> list[str]:
    """Return the distinct prompts that training never sees, in the task's order."""
    prompts = dict.fromkeys(example.prompt for example in task.examples())
    return [p for p in prompts if side_of(p, held_out=task.held_out) == "validation"]


def word_tokenizer(examples: list[Example]) -> Any:
    """Build a tokenizer with one token for every word of the examples."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for example in examples for text in example.texts() for word in text.split()})
    special = [PAD, EOS, MASK, UNKNOWN]
    if taken := [token for token in special if any(token in word for word in words)]:
        raise ValueError(f"the word {taken[0]!r} is a special token of the tokenizer. Write another in its place.")
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    backend = Backend(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, mask_token=MASK, unk_token=UNKNOWN
    )


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Examples as tensors, padded at their ends with the tokenizer's padding (id 0 where it has none)."""

    prompts: Tensor
    is_prompt: Tensor
    blocks: Tensor
    """(examples, blocks, tokens)"""
    is_block_token: Tensor
    num_blocks: Tensor
    answers: Tensor
    """With an end-of-text token; no column where no example has an answer."""
    is_answer: Tensor
    examples: list[Example]

    def unknown_words(self, tokenizer: Any) -> list[str]:
        """List words of these examples that the tokenizer has no token for."""
        unknown = tokenizer.unk_token_id  # none in some tokenizers; in others it is 0, as padding is
        texts = ((self.prompts, self.is_prompt), (self.blocks, self.is_block_token), (self.answers, self.is_answer))
        if unknown is None or not any((ids[is_token] == unknown).any() for ids, is_token in texts):
            return []
        words = sorted({word for example in self.examples for text in example.texts() for word in text.split()})
        return [word for word in words if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]

    def real_blocks(self) -> tuple[Tensor, Tensor]:
        """All blocks of all examples, (n, tokens), without repetition, and which of their tokens are real."""
        is_real = torch.arange(self.blocks.shape[1]) < self.num_blocks[:, None]
        both = torch.stack([self.blocks[is_real], self.is_block_token[is_real].long()], dim=1).unique(dim=0)
        return both[:, 0], both[:, 1].bool()


def encode(examples: list[Example], tokenizer: Any, *, split: Split, held_out: float) -> Encoded:
    """Encode the examples of one side of the split; the widths are those of all examples."""

    def ids(text: str, *, end: bool = False) -> list[int]:
        found = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*found, tokenizer.eos_token_id] if end and found else found

    def padded(rows: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
        table = torch.full((len(rows), width), tokenizer.pad_token_id or 0, dtype=torch.int64)
        for row, tokens in zip(table, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        return table, torch.arange(width) < torch.tensor([len(tokens) for tokens in rows])[:, None]

    chosen = [e for e in examples if side_of(e.prompt, held_out=held_out) == split]
    prompt_width = max(len(ids(e.prompt)) for e in examples)
    block_width = max(len(ids(block)) for e in examples for block in e.blocks)
    answer_width = max(len(ids(e.answer, end=True)) for e in examples)
    count = max(len(e.blocks) for e in examples)
    prompts, is_prompt = padded([ids(e.prompt) for e in chosen], prompt_width)
    answers, is_answer = padded([ids(e.answer, end=True) for e in chosen], answer_width)
    flat = [ids(e.blocks[b]) if b < len(e.blocks) else [] for e in chosen for b in range(count)]
    blocks, is_token = padded(flat, block_width)
    return Encoded(
        prompts=prompts,
        is_prompt=is_prompt,
        blocks=blocks.view(-1, count, block_width),
        is_block_token=is_token.view(-1, count, block_width),
        num_blocks=torch.tensor([len(e.blocks) for e in chosen], dtype=torch.int64),
        answers=answers,
        is_answer=is_answer,
        examples=chosen,
    )
