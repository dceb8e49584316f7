"""What goes into a denoiser of thoughts and what comes out."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

KeysValues = list[tuple[Tensor, Tensor]]
"""Keys and values (batch, heads, keys, width) of every layer."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Discrete positions of a sequence: prompt or answer."""

    ids: Int[Tensor, "batch tokens"]
    positions: Int[Tensor, "batch tokens"]
    is_null: Bool[Tensor, "batch tokens"]
    """Positions of a prompt that is withheld (classifier-free guidance)."""

    def rows(self, index: Int[Tensor, "rows"]) -> "Tokens":
        """Take some rows."""
        return Tokens(ids=self.ids[index], positions=self.positions[index], is_null=self.is_null[index])

    def with_answer(self, ids: Int[Tensor, "batch answer"], positions: Int[Tensor, "batch answer"]) -> "Tokens":
        """Append the positions of an answer."""
        is_null = torch.cat([self.is_null, torch.zeros_like(ids, dtype=torch.bool)], dim=1)
        return Tokens(
            ids=torch.cat([self.ids, ids], 1), positions=torch.cat([self.positions, positions], 1), is_null=is_null
        )


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Continuous positions of a sequence: blocks of thought, clean (t = 0) or noisy."""

    z_t: Float[Tensor, "batch latents dim"]
    x_0: Float[Tensor, "batch latents dim"]
    """The estimate of the step before (self-conditioning); zeros where there is none; z_t itself where it is clean."""
    t: Float[Tensor, "batch latents"]
    positions: Int[Tensor, "batch latents"]


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """What a forward pass returns: final states, and the keys and values of its own positions."""

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
    alike: Int[Tensor, "batch alike"] | None = None
    """Rows of the training data with the same prompt, itself the first (repeated where there are fewer)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where a batch stands in the global batch of a step: its rows key the noise, the counts divide the losses."""

    rows: Int[Tensor, "batch"]
    total_rows: int
    num_blocks: Int[Tensor, ""]
    num_answer: Int[Tensor, ""]

    @classmethod
    def whole(cls, batch: ThoughtBatch) -> "Part":
        """Take a batch as the global one."""
        rows = torch.arange(len(batch.prompt), device=batch.blocks.device)
        return cls(rows=rows, total_rows=len(rows), num_blocks=batch.num_blocks.sum(), num_answer=batch.is_answer.sum())
