"""Solvers of latent diffusion against an exact denoiser: Wasserstein-1 to a mixture of two Gaussians.

    python benchmarks/solvers.py [--samples 200000] [--seed 0]

The mixture: -1 and 1 with equal odds, standard deviation 0.3 about each; the denoiser is its posterior mean. The last
row is the distance of two samples of the mixture, below which nothing is told.
"""

import argparse
import sys

import torch
from machine import describe
from torch import Tensor

from redraft.latent.solvers import SOLVERS
from redraft.schedules import FlowSchedule

MEANS, STD = torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.3
STEPS = (5, 10, 20, 50)


def posterior_mean(z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Compute E[x_0 | z_t]."""
    variance = (alpha * STD) ** 2 + sigma**2
    misfit = z[:, None] - alpha * MEANS
    odds = (-(misfit**2) / (2 * variance)).softmax(-1)
    return (odds * (MEANS + alpha * STD**2 / variance * misfit)).sum(-1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, schedule = torch.Generator().manual_seed(args.seed), FlowSchedule()
    normal = lambda: torch.randn(args.samples, dtype=torch.float64, generator=chance)  # noqa: E731
    drawn = lambda: MEANS[(normal() > 0).long()] + STD * normal()  # noqa: E731
    wanted = drawn().sort().values

    def distance(made: Tensor) -> float:
        return float((made.sort().values - wanted).abs().mean())

    print(describe("solvers.py", sys.argv[1:]))
    print(f"| steps | {' | '.join(map(str, STEPS))} |\n|---|{'---|' * len(STEPS)}")
    for name, solver in SOLVERS.items():
        cells = []
        for steps in STEPS:
            times = schedule.grid(steps)
            alphas, sigmas = schedule.alpha(times), schedule.sigma(times)
            denoise = lambda z, i, a=alphas, s=sigmas: posterior_mean(z, a[i], s[i])  # noqa: E731
            cells.append(distance(solver(denoise, normal(), alphas, sigmas)))
        print(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    print(f"| two samples | {' | '.join([f'{distance(drawn()):.3f}'] * len(STEPS))} |")


if __name__ == "__main__":
    main()
