"""Sudoku of 4 x 4 cells with one solution, or with so few clues that nearly all have several."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product
from random import Random

from redraft.latent.tasks.worked import WorkedExample

EMPTY = "_"


@dataclass(frozen=True, kw_only=True)
class Sudoku:
    """Prompt: 16 cells, "_" where empty; each row of the solution is a block; the answer is the grid."""

    clues: tuple[int, int] = (6, 10)
    """Fewest and most clues."""
    is_unique: bool = True
    """Leave out puzzles with more than one solution."""
    num_examples: int = 20_000
    seed: int = 0
    held_out: float = 0.05

    def examples(self) -> Iterator[WorkedExample]:
        """Draw a grid and the cells that are shown."""
        grids, random = [*_grids()], Random(self.seed)
        for _ in range(self.num_examples):
            grid, shown = random.choice(grids), set(random.sample(range(16), random.randint(*self.clues)))
            if self.is_unique and sum(all(other[i] == grid[i] for i in shown) for other in grids) > 1:
                continue
            prompt = " ".join(cell if i in shown else EMPTY for i, cell in enumerate(grid))
            rows = tuple(" ".join(grid[first : first + 4]) for first in (0, 4, 8, 12))
            yield WorkedExample(prompt=prompt, blocks=rows, answer=" ".join(grid))

    def answer(self, blocks: list[str]) -> str:
        """The grid."""
        return " ".join(blocks)

    def is_solved(self, prompt: str, answer: str) -> bool:
        """Check clues, rows, columns and boxes."""
        clues, cells = prompt.split(), answer.split()
        if len(cells) != 16 or any(clue not in (EMPTY, cell) for clue, cell in zip(clues, cells, strict=True)):
            return False
        rows = [[(r, c) for c in range(4)] for r in range(4)]
        columns = [[(r, c) for r in range(4)] for c in range(4)]
        boxes = [[(r + i, c + j) for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
        return all(sorted(cells[4 * r + c] for r, c in unit) == ["1", "2", "3", "4"] for unit in rows + columns + boxes)


def _grids() -> Iterator[tuple[str, ...]]:
    """Yield all 288 grids."""
    lines = [*permutations("1234")]
    for rows in product(lines, repeat=4):
        columns_fit = all(len(set(column)) == 4 for column in zip(*rows, strict=True))
        if columns_fit and all(
            len({*rows[r][c : c + 2], *rows[r + 1][c : c + 2]}) == 4 for r in (0, 2) for c in (0, 2)
        ):
            yield tuple(cell for row in rows for cell in row)
