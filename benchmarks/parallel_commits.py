"""What it costs to decide several tokens at once: distance from a known joint distribution, against the steps.

With the exact conditionals of a toy joint the model makes no error, so all of the distance comes from tokens that were
decided together, each as if the others were not there. Prints a table; `--plot FILE` draws it.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "sampling")]

from test_distributions import denoiser, distance  # noqa: E402  (the toy is the tests')

from redraft.sampling import policies as p  # noqa: E402

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    errors = {steps: distance(denoiser(), steps=steps, unmask=p.Bernoulli()) for steps in STEPS}
    exact = distance(denoiser(), steps=3, unmask=p.TopK(), score=p.random_order)
    print("| steps | total variation | x steps |\n|---|---|---|")
    for steps, error in errors.items():
        print(f"| {steps} | {error:.4f} | {error * steps:.2f} |")
    print(f"\nOne token per forward (first hitting): {exact:.4f}, the noise of 20,000 draws.")
    if args.plot:
        draw(errors, exact, args.plot)


def draw(errors: dict[int, float], exact: float, path: Path) -> None:
    """Plot the distance against the steps, both logarithmic, with a line of slope -1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="steps", ylabel="total variation", xscale="log", yscale="log")
    axes.plot(list(errors), list(errors.values()), "o-", label="ancestral sampling")
    axes.plot(list(errors), [errors[1] / steps for steps in errors], ":", label="1 / steps")
    axes.axhline(exact, linestyle="--", label="one token per forward")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
