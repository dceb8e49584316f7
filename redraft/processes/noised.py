"""What every discrete noising process offers, and what it returns."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Noised:
    """Clean tokens x_0, noised tokens x_t, times t in [0, 1], and which positions the loss is taken at."""

    x_0: Int[Tensor, "*shape"]
    x_t: Int[Tensor, "*shape"]
    t: Float[Tensor, "*shape"]
    is_target: Bool[Tensor, "*shape"]

    def targets(self) -> Int[Tensor, "n"]:
        """Index the targets in the flattened tensors, in row-major order."""
        return self.is_target.flatten().nonzero()[:, 0]  # sync: how many there are is data

    def flatten(self) -> "Noised":
        """Lay out all four tensors in one dimension."""
        return Noised(
            x_0=self.x_0.flatten(), x_t=self.x_t.flatten(), t=self.t.flatten(), is_target=self.is_target.flatten()
        )

    def __getitem__(self, index: slice | Int[Tensor, "n"]) -> "Noised":
        """Take entries of all four tensors along their first dimension."""
        return Noised(x_0=self.x_0[index], x_t=self.x_t[index], t=self.t[index], is_target=self.is_target[index])


PosteriorKind = Literal["plug_in", "mixture"]
"""How a prediction enters q(x_s | x_t, x_0): its mean in x_0's place, or the average over x_0."""


@runtime_checkable
class Process(Protocol):
    """A noising process of tokens. See `masked.MaskedDiffusion` and `uniform.UniformDiffusion`."""

    def corrupt(
        self,
        x_0: Int[Tensor, "batch seq"],
        t: Float[Tensor, "batch"] | Float[Tensor, "batch seq"],
        *,
        u: Float[Tensor, "batch seq"] | None = None,
        generator: torch.Generator | None = None,
        can_change: Bool[Tensor, "batch seq"] | None = None,
    ) -> Noised: ...

    def loss(self, logits: Float[Tensor, "n vocab"], noised: Noised) -> Float[Tensor, "n"]: ...

    def prior(
        self,
        shape: tuple[int, ...],
        *,
        u: Float[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Int[Tensor, "..."]: ...

    def posterior(
        self,
        x_t: Int[Tensor, "n"],
        x_0_probs: Float[Tensor, "n vocab"],
        t: Float[Tensor, "n"],
        s: Float[Tensor, "n"],
        *,
        kind: PosteriorKind = "plug_in",
    ) -> Float[Tensor, "n vocab"]: ...

    def posterior_draw(
        self,
        x_0: Int[Tensor, "n"],
        x_t: Int[Tensor, "n"],
        t: Float[Tensor, "n"],
        s: Float[Tensor, "n"],
        *,
        u: Float[Tensor, "n"],
        x_t_prob: Float[Tensor, "n"] | None = None,
    ) -> Int[Tensor, "n"]: ...
