"""Composition of K permutations of five elements: serial, so it needs depth, by layers or by thoughts."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from random import Random

from redraft.data.sources import split_of
from redraft.latent.tasks.worked import WorkedExample

WORDS = ["".join(p) for p in permutations("12345")]


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Prompt: K permutations, one token each, applied from left to right; block k is the product of the first k.

    The prompt's permutations are among `num_factors`, drawn once; the products are any of the 120. (With all 120 as
    factors, what must be learnt first is a table of 14,400 products.)
    """

    shortest: int = 2
    longest: int = 12
    longest_trained: int = 10
    """All longer ones are held out, to measure extrapolation in depth."""
    num_factors: int = 8
    num_examples: int = 50_000
    seed: int = 0
    held_out: float = 0.02

    def examples(self) -> Iterator[WorkedExample]:
        """Draw sequences with uniform K; of those too long for training, only held-out ones."""
        random = Random(self.seed)
        words = random.sample(WORDS, self.num_factors)
        for _ in range(self.num_examples):
            factors = random.choices(words, k=random.randint(self.shortest, self.longest))
            products = [factors[0]]
            for factor in factors[1:]:
                products.append("".join(factor[int(place) - 1] for place in products[-1]))
            prompt = " ".join(factors)
            if len(factors) > self.longest_trained and split_of(prompt, validation_fraction=self.held_out) == "train":
                continue
            yield WorkedExample(prompt=prompt, blocks=tuple(products), answer=products[-1])

    def answer(self, blocks: list[str]) -> str:
        """The last product."""
        return blocks[-1] if blocks else ""

    def is_solved(self, prompt: str, answer: str) -> bool:
        """Follow each of the five elements through all permutations."""
        ends = []
        for thing in range(1, 6):
            for factor in prompt.split():
                thing = int(factor[thing - 1])
            ends.append(str(thing))
        return answer == "".join(ends)
