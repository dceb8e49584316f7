"""Recipes: functions that return the whole configuration of a run. The first line of the docstring is the help."""

from collections.abc import Callable

from redraft.recipes.latent import latent_autoencoder, latent_denoiser, latent_rollout
from redraft.recipes.stdlib import stdlib_demo, stdlib_small, stdlib_tiny
from redraft.training.config import RunConfig
from redraft.training.latent_config import LatentRunConfig

RECIPES: dict[str, Callable[[], RunConfig | LatentRunConfig]] = {
    "stdlib-tiny": stdlib_tiny,
    "stdlib-demo": stdlib_demo,
    "stdlib-small": stdlib_small,
    "latent-autoencoder": latent_autoencoder,
    "latent-denoiser": latent_denoiser,
    "latent-rollout": latent_rollout,
}
