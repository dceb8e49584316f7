"""Recipes: functions that return the whole configuration of a run. The first line of the docstring is the help."""

from collections.abc import Callable

from redraft.latent.config import LatentRunConfig
from redraft.latent.recipes import (
    latent_autoencoder,
    latent_denoiser,
    latent_rollout,
    thought_ar,
    thought_masked,
)
from redraft.recipes.published import (
    a2d_bd3lm,
    a2d_mdlm,
    bd3lm_owt,
    bert_chat,
    dream_sft,
    llada_pretrain,
    llada_sft,
    mdlm_owt,
)
from redraft.recipes.stdlib import stdlib_demo, stdlib_small, stdlib_tiny
from redraft.training.config import RunConfig

RECIPES: dict[str, Callable[[], RunConfig | LatentRunConfig]] = {
    "stdlib-tiny": stdlib_tiny,
    "stdlib-demo": stdlib_demo,
    "stdlib-small": stdlib_small,
    "llada-sft": llada_sft,
    "dream-sft": dream_sft,
    "a2d-mdlm": a2d_mdlm,
    "a2d-bd3lm": a2d_bd3lm,
    "bert-chat": bert_chat,
    "mdlm-owt": mdlm_owt,
    "bd3lm-owt": bd3lm_owt,
    "llada-pretrain": llada_pretrain,
    "latent-autoencoder": latent_autoencoder,
    "latent-denoiser": latent_denoiser,
    "latent-rollout": latent_rollout,
    "thought-ar": thought_ar,
    "thought-masked": thought_masked,
}
