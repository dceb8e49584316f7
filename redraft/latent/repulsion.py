"""Repulsion between the samples of one prompt, so that they think of different things."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def push_apart(
    z: Float[Tensor, "rows latents dim"], place: Int[Tensor, "rows"], *, samples: int
) -> Float[Tensor, "rows latents dim"]:
    """Return the mean over the others j of 2 exp(-d^2 / s^2) (z_i - z_j); rows of a prompt stand together.

    The others are those at the same place; at a negative one a row neither pushes nor is pushed. s is the median
    distance between them. LaDiR (arXiv 2510.04573) has a factor 1 - d^2 / s^2 beside it, which draws together whoever
    is farther apart than s, and does nothing for two samples.
    """
    flat = z.unflatten(0, (-1, samples)).flatten(2)  # (P, K, n d)
    apart = flat[:, :, None] - flat[:, None]  # (P, K, K, n d)
    place = place.view(-1, samples)
    is_pair = (place[:, :, None] == place[:, None]) & (place >= 0)[:, None]  # (P, K, K)
    is_pair = is_pair & ~torch.eye(samples, dtype=torch.bool, device=z.device)
    squared = apart.square().sum(-1)
    scale = squared.masked_fill(~is_pair, torch.nan).flatten(1).nanmedian(dim=1).values.clamp(min=1e-8)
    force = 2 * torch.exp(-squared / scale[:, None, None]) / is_pair.sum(-1, keepdim=True)
    return (force.where(is_pair, 0.0)[..., None] * apart).sum(2).flatten(0, 1).view_as(z)
