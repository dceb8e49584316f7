"""What a discrete noising process returns."""

from dataclasses import dataclass

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
