"""Solvers of Gaussian diffusion, from noise to data along a grid of times. They never see a network.

A solver gets `denoise(z_t, i)`, which estimates x_0 at the i-th time, the latents at the first time, and alpha and
sigma at all times. It asks for one estimate in each step and returns the latents at the last time.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Solver = Callable[[Callable[[Tensor, int], Tensor], Tensor, Tensor, Tensor], Tensor]


def ddim(
    denoise: Callable[[Tensor, int], Tensor],
    z: Float[Tensor, "*shape"],
    alphas: Float[Tensor, "steps_and_one"],
    sigmas: Float[Tensor, "steps_and_one"],
) -> Float[Tensor, "*shape"]:
    """DDIM (arXiv 2010.02502, Eq. 12): z_s = alpha_s x_0 + sigma_s eps. On the flow path it is Euler's method."""
    for i in range(len(alphas) - 1):
        x_0 = denoise(z, i)
        eps = (z - alphas[i] * x_0) / sigmas[i]
        z = alphas[i + 1] * x_0 + sigmas[i + 1] * eps
    return z


def dpm_solver_2m(
    denoise: Callable[[Tensor, int], Tensor],
    z: Float[Tensor, "*shape"],
    alphas: Float[Tensor, "steps_and_one"],
    sigmas: Float[Tensor, "steps_and_one"],
) -> Float[Tensor, "*shape"]:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2): second order; the first and the last step are first order.

    z_s = (sigma_s / sigma_t) z - alpha_s (e^-h - 1) ((1 + r) x_0 - r x_0_before), r = h / (2 h_before), with h the
    step in log(alpha / sigma).
    """
    widths = (alphas / sigmas).log().diff()  # (steps,); infinite where alpha or sigma is 0
    before = z
    for i in range(len(alphas) - 1):
        x_0 = denoise(z, i)
        is_first_order = i == 0 or i + 2 == len(alphas)
        blend = x_0 if is_first_order else torch.lerp(before, x_0, 1 + widths[i] / (2 * widths[i - 1]))
        ratio = sigmas[i + 1] / sigmas[i]
        z = ratio * z + (alphas[i + 1] - alphas[i] * ratio) * blend
        before = x_0
    return z


SOLVERS: dict[str, Solver] = {"ddim": ddim, "dpm++2m": dpm_solver_2m}
