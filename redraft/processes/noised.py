"""What every discrete noising process offers, and what it returns."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.schedules import Schedule


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
"""How a prediction enters q(x_s | x_t, x_0): see `uniform.UniformDiffusion.posterior_draw`."""


@runtime_checkable
class Process(Protocol):
    """A noising process of tokens. See `masked.MaskedDiffusion` and `uniform.UniformDiffusion`.

    Its likelihood bound is the mean over t of `loss`, summed over the targets of a row.
    """

    noise: ClassVar[Literal["mask", "uniform"]]
    """What noise looks like: the mask token, or any token of the vocabulary. A preset starts from one of them."""
    default_preset: ClassVar[str]
    """The sampler of a model whose checkpoint names none."""
    varied_sampling: ClassVar[dict[str, Any]]
    """Sampling settings that give varied text, saved with a model trained from random weights: a small model repeats
    one token if the likeliest is always taken. Empty if the default preset draws at random anyway."""

    @classmethod
    def build(cls, *, mask_token_id: int, vocab_size: int, schedule: Schedule, exclude_mask: bool = True) -> "Process":
        """Build the process for a model; each process takes what it needs."""
        ...

    def corrupt(
        self,
        x_0: Int[Tensor, "batch seq"],
        t: Float[Tensor, "batch"] | Float[Tensor, "batch seq"],
        *,
        u: Float[Tensor, "batch seq"],
        can_change: Bool[Tensor, "batch seq"] | None = None,
    ) -> Noised:
        """Noise tokens at time t; `u` ~ U[0, 1) is all the randomness, and only what `can_change` is noised."""
        ...

    def loss(self, logits: Float[Tensor, "n vocab"], noised: Noised) -> Float[Tensor, "n"]:
        """Return nats of each target."""
        ...

    def prior(self, u: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return pure noise (t = 1), drawn by `u` ~ U[0, 1)."""
        ...
