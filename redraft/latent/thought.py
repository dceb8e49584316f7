"""What comes of thinking: thoughts, trains of thought, and the choice among several."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Estimate(NamedTuple):
    """What the denoiser took a block to be at one forward."""

    t: float
    text: str
    latents: Float[Tensor, "latents dim"]


@dataclass(frozen=True, kw_only=True)
class Thought:
    """One block of thought."""

    latents: Float[Tensor, "latents dim"]
    text: str
    steps: list[Estimate]
    """The estimate at every forward; empty unless traced."""
    instability: float
    """Root mean square change of the estimate at the last forward (from 0, where it was the only one), in standard
    deviations of the latents."""


@dataclass(frozen=True, kw_only=True)
class TrainOfThought:
    """One sample: its thoughts, its answer, what it cost."""

    thoughts: list[Thought]
    answer: str
    """Empty for a model without an answer decoder."""
    forwards: int
    """Passes of the denoiser this sample took part in: denoising, committing, answering."""
    stop: str
    """Why the thoughts ended: "stop head" or "blocks"."""

    @property
    def text(self) -> str:
        """The thoughts as text, in order."""
        return " ".join(thought.text for thought in self.thoughts)


def vote(
    samples: Sequence[TrainOfThought], *, verify: Callable[[TrainOfThought], bool] | None = None
) -> TrainOfThought:
    """Choose among samples: the first that is verified, else the first of the commonest answer (text, without one).

    Raises ValueError where there is none.
    """
    if not samples:
        raise ValueError("there is no sample to choose from; got none.")
    verified = next((sample for sample in samples if verify and verify(sample)), None)
    if verified is not None:
        return verified
    counts = Counter(sample.answer or sample.text for sample in samples)
    return max(samples, key=lambda sample: counts[sample.answer or sample.text])  # max keeps the first of equals
