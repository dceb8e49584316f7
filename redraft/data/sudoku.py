"""Sudoku grids as rows of tokens: masked diffusion learns solved grids, and a puzzle is a grid with masked cells.

A cell is one character, "_" (the mask token; "." and "0" are read as it) where it is empty; each row of the grid is a
word. So `redraft infill MODEL "53__7____ 6__195___ ..."` solves a puzzle, and the given cells are given tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product
from math import isqrt
from random import Random
from typing import Any

import numpy as np

from redraft.data.config import DataConfig
from redraft.data.packing import PackingReport, WindowDataset, Windows
from redraft.data.prepare import PreparedData
from redraft.data.sources import split_of
from redraft.data.tokenizer import EOS, PAD, Tokenizer

EMPTY = "_"
NUM_GRIDS = {4: 12_000, 9: 200_000}
"""Solved grids to learn, by size. There are 288 of 4 x 4, so they are repeated."""
NUM_BASES = 1000
"""Grids of 9 x 9 made by search; the others are these with rows, columns and digits permuted."""
NUM_VALIDATION = 500
HELD_OUT_4 = 0.05
"""Share of the 4 x 4 grids that training does not see."""


@dataclass(frozen=True, kw_only=True)
class Sudoku:
    """Sudoku of `size` x `size` cells in boxes of sqrt(size); a grid is a list of cells by row, 0 where empty."""

    size: int = 9

    @property
    def box(self) -> int:
        """Cells along a side of a box."""
        return isqrt(self.size)

    @cached_property
    def units(self) -> list[list[int]]:
        """The cells of each row, column and box."""
        n, b = self.size, self.box
        rows = [[n * r + c for c in range(n)] for r in range(n)]
        columns = [list(column) for column in zip(*rows, strict=True)]
        boxes = [
            [n * (r + i) + c + j for i in range(b) for j in range(b)] for r in range(0, n, b) for c in range(0, n, b)
        ]
        return rows + columns + boxes

    @cached_property
    def peers(self) -> list[list[int]]:
        """The other cells of each cell's row, column and box."""
        return [sorted({j for unit in self.units if i in unit for j in unit} - {i}) for i in range(self.size**2)]

    def text(self, cells: Any) -> str:
        """Write a grid, a line for each row."""
        line = "".join(str(cell) if cell else EMPTY for cell in cells)
        return "\n".join(line[i : i + self.size] for i in range(0, len(line), self.size))

    def read(self, text: str) -> list[int]:
        """Read a grid; spaces and line ends are ignored. Raises ValueError where it has another number of cells."""
        cells = [int(cell) if cell.isdecimal() else 0 for cell in "".join(text.split())]
        if len(cells) != self.size**2 or max(cells) > self.size:
            raise ValueError(f"a grid has {self.size**2} cells of 1 to {self.size} or {EMPTY}; got {text!r}.")
        return cells

    def is_solved(self, puzzle: list[int], cells: list[int]) -> bool:
        """Check clues, rows, columns and boxes."""
        keeps_clues = all(clue in (0, cell) for clue, cell in zip(puzzle, cells, strict=True))
        whole = list(range(1, self.size + 1))
        return keeps_clues and all(sorted(cells[i] for i in unit) == whole for unit in self.units)

    def solutions(self, puzzle: list[int], *, random: Random | None = None) -> Iterator[list[int]]:
        """Search all solutions, the cell with the fewest candidates first; `random` draws the order of the digits."""
        cells, left = list(puzzle), [(1 << self.size) - 1] * self.size**2  # candidates of each cell as bits
        for i, digit in enumerate(puzzle):
            if digit:
                for j in self.peers[i]:
                    left[j] &= ~(1 << (digit - 1))
        return self._search(cells, left, random)

    def _search(self, cells: list[int], left: list[int], random: Random | None) -> Iterator[list[int]]:
        empty = [i for i, cell in enumerate(cells) if not cell]
        if not empty:
            yield list(cells)
            return
        i = min(empty, key=lambda i: left[i].bit_count())
        digits = [digit for digit in range(1, self.size + 1) if left[i] >> (digit - 1) & 1]
        if random:
            random.shuffle(digits)
        for digit in digits:
            bit, after = 1 << (digit - 1), list(left)
            for j in self.peers[i]:
                after[j] &= ~bit
            cells[i] = digit
            yield from self._search(cells, after, random)
        cells[i] = 0

    def is_easy(self, puzzle: list[int]) -> bool:
        """Whether cells with a single candidate, one after the other, fill the grid."""
        cells, left = list(puzzle), set(range(1, self.size + 1))
        while 0 in cells:
            singles = [(i, left - {cells[j] for j in self.peers[i]}) for i, cell in enumerate(cells) if not cell]
            filled = [(i, digits.pop()) for i, digits in singles if len(digits) == 1]
            if not filled:
                return False
            for i, digit in filled:
                cells[i] = digit
        return True

    def puzzle(self, grid: list[int], *, clues: int, random: Random) -> list[int]:
        """Empty cells in random order while the solution stays the only one, down to `clues` or where none may go."""
        puzzle, order = list(grid), list(range(self.size**2))
        random.shuffle(order)
        for i in order:
            if sum(map(bool, puzzle)) == clues:
                break
            puzzle[i] = 0
            others = self.solutions(puzzle)
            if next(others) and next(others, None):
                puzzle[i] = grid[i]
        return puzzle

    def grids(self, count: int, *, bases: int, seed: int) -> np.ndarray:
        """Draw solved grids, (count, size * size) uint8: made by search, then rows, columns and digits permuted."""
        n, b, rng, random = self.size, self.box, np.random.default_rng(seed), Random(seed)
        base = np.array([next(self.solutions([0] * n * n, random=random)) for _ in range(bases)], np.uint8)
        lines = np.array(
            [
                [b * band + order[band][i] for band in bands for i in range(b)]
                for bands in permutations(range(b))
                for order in product(list(permutations(range(b))), repeat=b)
            ]
        )  # every order of the rows that keeps the bands together
        grids = base[rng.integers(bases, size=count)].reshape(count, n, n)
        rows, columns = (lines[rng.integers(len(lines), size=count)] for _ in range(2))
        grids = np.take_along_axis(grids, rows[:, :, None], axis=1)
        grids = np.take_along_axis(grids, columns[:, None, :], axis=2)
        flipped = rng.random(count) < 0.5
        grids[flipped] = grids[flipped].transpose(0, 2, 1)
        digits = rng.random((count, n)).argsort(axis=1).astype(np.uint8) + 1
        return np.take_along_axis(digits, grids.reshape(count, n * n).astype(np.int64) - 1, axis=1)


def prepare_grids(config: DataConfig, *, tokenizer: Tokenizer | None, objective: str) -> PreparedData:
    """Make solved grids of the sizes in `data.source`, e.g. "9,4"; the ends of rows are given, the cells are learnt.

    Raises ValueError for other sizes, for a tokenizer, and for grids longer than `data.seq_len`.
    """
    sizes = config.source.split(",")
    if not {*sizes} <= {*map(str, NUM_GRIDS)}:
        raise ValueError(f"data.source must be sizes of grids; got {config.source!r}. Use 9, 4 or 9,4.")
    if tokenizer is not None:
        raise ValueError("grids have a tokenizer of their own; got model.start with another. Leave it out.")
    longest = max(map(int, sizes)) * (max(map(int, sizes)) + 1) - 1
    if longest > config.seq_len:
        raise ValueError(f"the largest grid has {longest} tokens; got seq_len={config.seq_len}. Raise data.seq_len.")
    own = grid_tokenizer()
    train, validation = zip(*(_grids(Sudoku(size=int(size))) for size in sizes), strict=True)
    (train, train_report), (validation, report) = (_windows(own, parts, longest) for parts in (train, validation))
    return PreparedData(
        train=train,
        validation=validation,
        tokenizer=own,
        train_report=train_report,
        validation_report=report,
        generation={"preset": "llada", "temperature": 0.0},
    )


def _grids(sudoku: Sudoku) -> tuple[np.ndarray, np.ndarray]:
    """Return grids for training and for validation; no grid of the one is in the other."""
    count = NUM_GRIDS[sudoku.size]
    if sudoku.size == 4:
        every = np.unique(sudoku.grids(20 * 288, bases=20, seed=0), axis=0)
        is_held_out = [split_of(sudoku.text(grid), validation_fraction=HELD_OUT_4) == "validation" for grid in every]
        kept, held_out = every[~np.array(is_held_out)], every[is_held_out]
        return kept[np.arange(count) % len(kept)], held_out
    return (
        sudoku.grids(count, bases=NUM_BASES, seed=0),
        sudoku.grids(NUM_VALIDATION, bases=NUM_VALIDATION, seed=1),
    )


def _windows(tokenizer: Tokenizer, parts: tuple[np.ndarray, ...], longest: int) -> tuple[WindowDataset, PackingReport]:
    """Put grids of several sizes into padded rows."""
    vocabulary = tokenizer.get_vocab()
    rows = np.full((sum(map(len, parts)), longest), vocabulary[PAD], np.uint8)
    is_target, is_token = np.zeros_like(rows), np.zeros_like(rows)
    start = 0
    for grids in parts:
        cells, size = grids.shape[1], isqrt(grids.shape[1])
        part, place = slice(start, start + len(grids)), np.arange(cells) + np.arange(cells) // size
        rows[part, : cells + size - 1] = vocabulary["\n"]
        rows[part, place] = grids + (vocabulary["1"] - 1)
        is_target[part, place], is_token[part, : cells + size - 1] = 1, 1
        start += len(grids)
    report = PackingReport(
        num_documents=len(rows),
        num_tokens=int(is_token.sum()),
        num_windows=len(rows),
        num_target_tokens=int(is_target.sum()),
    )
    return WindowDataset(windows=Windows(rows, is_token, is_target), is_trimmed=True), report


def grid_tokenizer() -> Tokenizer:
    """Build a tokenizer with a token for each cell and for the end of a row; the empty cell is the mask token."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, EOS, EMPTY, "\n", *"123456789"]
    backend = Backend(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token=EOS))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Strip(),
            normalizers.Replace(Regex(r"[\s/]+"), "\n"),
            normalizers.Replace(Regex("[.0]"), EMPTY),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    mask = AddedToken(EMPTY, normalized=True, special=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS, mask_token=mask)
