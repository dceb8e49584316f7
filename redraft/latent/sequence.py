"""What goes into a denoiser of thoughts and what comes out, and a batch's place in a training step."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.randomness import normal, uniform
from redraft.schedules import stratified_times

KeysValues = list[tuple[Tensor, Tensor]]
"""Keys and values (batch, heads, keys, width) of every layer."""


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """Discrete positions of a sequence: prompt or answer."""

    ids: Int[Tensor, "batch tokens"]
    positions: Int[Tensor, "batch tokens"]
    is_null: Bool[Tensor, "batch tokens"]
    """Positions of a prompt that is withheld (classifier-free guidance)."""

    def with_answer(self, ids: Int[Tensor, "batch answer"], positions: Int[Tensor, "batch answer"]) -> "TokenInputs":
        """Append the positions of an answer."""
        return TokenInputs(
            ids=torch.cat([self.ids, ids], dim=1),
            positions=torch.cat([self.positions, positions], dim=1),
            is_null=torch.cat([self.is_null, torch.zeros_like(ids, dtype=torch.bool)], dim=1),
        )


@dataclass(frozen=True, kw_only=True)
class LatentInputs:
    """Continuous positions of a sequence: blocks of thought, clean (t = 0) or noisy."""

    z_t: Float[Tensor, "batch latents dim"]
    x_0: Float[Tensor, "batch latents dim"]
    """The estimate of the previous step (self-conditioning); zeros where there is none; for clean blocks z_t itself."""
    t: Float[Tensor, "batch latents"]
    positions: Int[Tensor, "batch latents"]


@dataclass(frozen=True, kw_only=True)
class DenoiserOutput:
    """Final states, and the keys and values of the positions that were fed."""

    tokens: Float[Tensor, "batch tokens width"]
    latents: Float[Tensor, "batch latents width"]
    keys_values: KeysValues


@dataclass(frozen=True, kw_only=True)
class ThoughtBatch:
    """Rows of a task: prompt, blocks of thought as normalised latents, and an answer; all padded at their ends."""

    prompt: Int[Tensor, "batch prompt"]
    is_prompt: Bool[Tensor, "batch prompt"]
    blocks: Float[Tensor, "batch blocks latents dim"]
    num_blocks: Int[Tensor, "batch"]
    answer: Int[Tensor, "batch answer"]
    is_answer: Bool[Tensor, "batch answer"]
    same_prompt: Int[Tensor, "batch rows"] | None = None
    """Numbers of the training rows with the same prompt, the row itself first (repeated where there are fewer)."""


@dataclass(frozen=True, kw_only=True)
class StepShare:
    """A batch's place in the global batch of a step: its rows key the noise, and the counts divide the losses.

    Random numbers are keyed by (seed, step, purpose, row): how the global batch is split changes none of them.
    """

    seed: int
    step: int
    rows: Int[Tensor, "batch"]
    """Numbers of its rows in the global batch."""
    total_rows: int
    num_blocks: Int[Tensor, ""]
    num_answer: Int[Tensor, ""]
    """Real blocks and real answer tokens of the global batch."""

    def coin(self, purpose: int) -> float:
        """Return one uniform number for the whole step."""
        return float(uniform(self.seed, self.step, purpose))

    def uniform(self, purpose: int, *shape: int) -> Float[Tensor, "batch ..."]:
        """Return uniform numbers (batch, *shape), float64."""
        return uniform(self.seed, self.step, purpose, *self._counters(shape))

    def normal(self, purpose: int, *shape: int) -> Float[Tensor, "batch ..."]:
        """Return standard normal numbers (batch, *shape), float64."""
        return normal(self.seed, self.step, purpose, *self._counters(shape))

    def stratified(self, purpose: int, columns: int) -> Float[Tensor, "batch columns"]:
        """Return uniform numbers in (0, 1), of which each column is spread evenly over the global batch; float64."""
        count, places = self.total_rows, torch.arange(columns, device=self.rows.device)
        every_row = torch.arange(count, device=self.rows.device)[:, None]
        strata = uniform(self.seed, self.step, purpose, every_row, places).argsort(dim=0)[self.rows]
        offset = uniform(self.seed, self.step, purpose + 100, places)
        return stratified_times(strata.to(torch.float64), total=count, offset=offset).clamp(1e-6, 1 - 1e-6)

    def _counters(self, shape: tuple[int, ...]) -> list[Tensor]:
        rows = self.rows.view(-1, *[1] * len(shape))
        places = torch.arange(torch.Size(shape).numel(), device=rows.device).view(shape)
        return [rows, places] if shape else [rows]
