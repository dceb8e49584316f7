"""Sudoku of 4 x 4 cells with one solution, or with so few clues that nearly all have several."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from redraft.data.sudoku import EMPTY, SudokuRules
from redraft.latent.tasks.worked import WorkedExample

RULES = SudokuRules(size=4)


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
        solutions = sorted(RULES.solutions([0] * 16))
        grids, random = [tuple(map(str, grid)) for grid in solutions], Random(self.seed)
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
        try:
            return RULES.is_solved(RULES.read(prompt), RULES.read(answer))
        except ValueError:
            return False
