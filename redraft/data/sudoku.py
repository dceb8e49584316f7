"""Sudoku: rules, solutions, puzzles with one solution. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import isqrt
from random import Random
from typing import Any

EMPTY = "_"


@dataclass(frozen=True, kw_only=True)
class SudokuRules:
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
        digits = {EMPTY: 0} | {str(digit): digit for digit in range(1, self.size + 1)}
        cells = [digits.get(cell, -1) for cell in "".join(text.split())]
        if len(cells) != self.size**2 or -1 in cells:
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
            if len(list(islice(self.solutions(puzzle), 2))) > 1:
                puzzle[i] = grid[i]
        return puzzle
