"""Samplers by the names users know, built from the settings that Python, CLI and saved configs share."""

from dataclasses import dataclass, replace

from redraft.errors import unknown_name
from redraft.sampling.loop import Sampler
from redraft.sampling.policies import Blocks, Confidence, EndOfSequence, Filled, Quota, Random, Score, WholeCanvas

SCORES: dict[str, Score] = {"confidence": Confidence(), "random": Random()}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named sampler: its score and where it comes from."""

    score: str
    source: str


PRESETS = {
    "llada": Preset(score="confidence", source="low-confidence remasking, LLaDA, Section 2.4 of arXiv 2502.09992"),
    "llada-random": Preset(score="random", source="random remasking, LLaDA, Algorithm 4 of arXiv 2502.09992"),
}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to denoise: the settings of `generate`, `infill`, `redraft sample` and a checkpoint's saved defaults."""

    preset: str = "llada"
    """Named sampler: llada (surest tokens first), llada-random (any order)."""
    max_new_tokens: int = 128
    """Tokens to generate."""
    steps: int | None = None
    """Denoising steps for the whole text; by default one per token."""
    block_size: int | None = None
    """Tokens per block, decoded from left to right; by default the whole canvas at once."""
    temperature: float = 0.0
    """Temperature of the draws; 0 takes the likeliest token."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this share of the mass, in (0, 1]."""
    top_k: int | None = None
    """Keep this many likeliest tokens."""
    seed: int = 0
    """Seed of the draws."""
    stop: str | None = "eos"
    """When a text ends early: eos, or None for never."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise unknown_name("preset", self.preset, PRESETS)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}.")
        if self.block_size is not None and (self.block_size < 1 or self.max_new_tokens % self.block_size):
            divisors = [n for n in range(1, self.max_new_tokens + 1) if self.max_new_tokens % n == 0]
            near = sorted(divisors, key=lambda n: abs(n - (self.block_size or 1)))[:3]
            raise ValueError(
                f"block_size must divide max_new_tokens; got {self.block_size} and {self.max_new_tokens}. "
                f"Use {', '.join(str(n) for n in sorted(near))}."
            )
        if self.stop not in ("eos", None):
            raise ValueError(f"stop must be 'eos' or None; got {self.stop!r}.")
        self.sampler(eos_token_id=None)  # its own checks

    def sampler(self, *, eos_token_id: int | None) -> Sampler:
        """Build the combination of policies."""
        ends = EndOfSequence(eos_token_id=eos_token_id) if self.stop and eos_token_id is not None else Filled()
        return Sampler(
            steps=self.max_new_tokens if self.steps is None else self.steps,
            frontier=Blocks(size=self.block_size) if self.block_size else WholeCanvas(),
            score=SCORES[PRESETS[self.preset].score],
            unmask=Quota(),
            stop=ends,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )

    def for_infilling(self, *, num_holes: int) -> "SamplingConfig":
        """Fill holes: as many steps as there are holes unless said otherwise, and no early end.

        Raises ValueError for a block size: holes are filled all together.
        """
        if self.block_size is not None:
            raise ValueError(f"block_size does not apply to infilling; got {self.block_size}. Leave it out.")
        return replace(self, steps=self.steps or max(num_holes, 1), stop=None)
