"""Paragraphs of the standard library's docstrings as a task: a block of thought is a piece of a sentence."""

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from redraft.data.sources import NOT_SOURCES, split_of
from redraft.data.tokenizer import train_tokenizer
from redraft.latent.tasks import WorkedExample

PROMPT_TOKENS, MOST_TOKENS, FEWEST = 12, 60, 2
NOT_PROSE = re.compile(
    r">>>|\.\.\. |[-=+*~^_]{3,}|->|::|[{}<>\\=|]|\S {2,}\S+ {2,}|^ *[-*:@] *\w|^ *\w+:$", re.MULTILINE
)
WORD = re.compile(r"[\"'(]*[A-Za-z][A-Za-z'/-]*[\"')]*[.,;:!?)]*")


def docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the docstring of every module, class and function below a folder, tests left out."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if NOT_SOURCES & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, UnicodeDecodeError):  # lib2to3 has grammars of other Pythons
            continue
        yield from _documented(tree, ".".join(parts))


def _documented(node: Any, name: str) -> Iterator[tuple[str, str]]:
    if text := ast.get_docstring(node):
        yield name, text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}")


def is_prose(paragraph: str) -> bool:
    """Say whether a paragraph is whole sentences of English: no doctest, signature, table, list, or capitals."""
    words = paragraph.split()
    plain = sum(bool(WORD.fullmatch(word)) and not (len(word) > 3 and word.isupper()) for word in words)
    whole = paragraph[:1].isupper() and paragraph.rstrip()[-1:] in (".", "!", "?")
    return len(words) >= 8 and whole and not NOT_PROSE.search(paragraph) and plain >= 0.85 * len(words)


def paragraphs(root: Path | None = None) -> dict[str, list[str]]:
    """Return the paragraphs of prose by dotted name, each once: where it first occurs."""
    found: dict[str, list[str]] = {}
    seen = set()
    for name, text in docstrings(root or Path(sysconfig.get_path("stdlib"))):
        for paragraph in filter(is_prose, re.split(r"\n\s*\n", text)):
            flat = " ".join(paragraph.split())
            if flat not in seen:
                seen.add(flat)
                found.setdefault(name, []).append(flat)
    return found


def cut(tokens: list[str], *, size: int, first: int) -> list[str]:
    """Cut into blocks of at most `size` tokens, the first of `first`; a sentence ends its block."""
    blocks: list[list[str]] = [[]]
    for i, token in enumerate(tokens):
        blocks[-1].append(token)
        ends = token[-1] in ".!?" and (i + 1 == len(tokens) or tokens[i + 1].startswith("Ġ"))
        if ends or len(blocks[-1]) == (first if len(blocks) == 1 else size):
            blocks.append([])
    return [" ".join(block) for block in blocks if block]


@dataclass(frozen=True, kw_only=True)
class Prose:
    """Write a paragraph, given the name of what it documents. Words are pieces of a byte-level BPE.

    Held out by document: all paragraphs of a docstring have its name as their prompt. (The merges of the BPE have seen
    all documents.) `starts` cuts every paragraph to learn from several times, into a first block of so many tokens: an
    autoencoder then sees a token at every place of a block.
    """

    vocab_size: int = 2048
    block_tokens: int = 12
    starts: tuple[int, ...] = ()
    held_out: float = 0.05
    root: Path | None = None

    @cached_property
    def documents(self) -> dict[str, list[str]]:
        """Paragraphs by dotted name."""
        return paragraphs(self.root)

    @cached_property
    def bpe(self) -> Any:
        """The tokenizer."""
        texts = [" " + text for texts in self.documents.values() for text in texts]
        return train_tokenizer(texts, vocab_size=self.vocab_size)

    def pieces(self, text: str) -> list[str]:
        """Cut a text into the words of this task."""
        return [str(piece) for piece in self.bpe.tokenize(" " + text)]

    def text(self, words: str) -> str:
        """Put the words of this task together again."""
        return str(self.bpe.convert_tokens_to_string(words.split())).strip()

    def examples(self) -> Iterator[WorkedExample]:
        """Yield runs of blocks of one paragraph: at least two, and at most 60 tokens where all are full."""
        return iter(self._examples)

    @cached_property
    def _examples(self) -> list[WorkedExample]:
        return [example for name in self.documents for example in self._of(name)]

    def _of(self, name: str) -> Iterator[WorkedExample]:
        words = re.sub(r"[\W_]+|(?<=[a-z])(?=[A-Z])", " ", name).lower()
        prompt = " ".join(self.pieces(words)[-PROMPT_TOKENS:])
        largest = MOST_TOKENS // self.block_tokens
        starts = self.starts if split_of(prompt, validation_fraction=self.held_out) == "train" else ()
        for pieces in map(self.pieces, self.documents[name]):
            for first in (self.block_tokens, *starts):
                blocks = cut(pieces, size=self.block_tokens, first=first)
                for at in range(0, len(blocks), largest):
                    if len(run := tuple(blocks[at : at + largest])) >= FEWEST:
                        yield WorkedExample(prompt=prompt, blocks=run, answer="")

    def answer(self, blocks: list[str]) -> str:
        """Read the paragraph off its blocks."""
        return self.text(" ".join(blocks))

    def is_solved(self, prompt: str, answer: str) -> bool:
        """Say whether it stands in some docstring word for word."""
        return bool(answer) and any(answer in text for texts in self.documents.values() for text in texts)
