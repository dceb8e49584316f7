"""Countdown with three numbers: reach a target with +, - and *, each number used once (LaDiR, arXiv 2510.04573)."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

from redraft.latent.tasks.worked import WorkedExample

OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True, kw_only=True)
class Countdown:
    """Prompt "3 5 7 22"; a step "a op b c", meaning a op b = c, is a block of 4 tokens; the answer is both steps."""

    largest: int = 15
    largest_target: int = 60
    held_out: float = 0.08

    def examples(self) -> Iterator[WorkedExample]:
        """Yield every solution of every solvable (numbers, target); sums and products with the larger number first."""
        for numbers in combinations_with_replacement(range(1, self.largest + 1), 3):
            solutions = {
                steps for steps in _solutions(numbers) if 0 < int(steps[-1].split()[-1]) <= self.largest_target
            }
            for steps in sorted(solutions):
                target = steps[-1].split()[-1]
                prompt = f"{' '.join(map(str, numbers))} {target}"
                yield WorkedExample(prompt=prompt, blocks=steps, answer=" ".join(steps))

    def answer(self, blocks: list[str]) -> str:
        """Both steps."""
        return " ".join(blocks)

    def is_solved(self, prompt: str, answer: str) -> bool:
        """Check the steps: each uses two available numbers, and states the right result."""
        *numbers, target = prompt.split()
        there, words = Counter(numbers), answer.split()
        if len(words) != 4 * (len(numbers) - 1):
            return False
        steps = [words[i : i + 4] for i in range(0, len(words), 4)]
        for a, operator, b, result in steps:
            there.subtract([a, b])
            if operator not in OPERATORS or min(there.values()) < 0 or not re.fullmatch("-?[0-9]+", result):
                return False
            if OPERATORS[operator](int(a), int(b)) != int(result):
                return False
            there[result] += 1
        return +there == Counter([target])


def _solutions(numbers: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    for i, left in enumerate(numbers):
        first, second = (n for j, n in enumerate(numbers) if j != i)
        for step, result in _steps(first, second):
            for last, _ in _steps(result, left):
                yield step, last


def _steps(a: int, b: int) -> Iterator[tuple[str, int]]:
    """Yield the results of two numbers, without negative ones."""
    high, low = max(a, b), min(a, b)
    for sign, operator in OPERATORS.items():
        yield f"{high} {sign} {low} {operator(high, low)}", operator(high, low)
