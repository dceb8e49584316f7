"""Recipes: functions that return the whole configuration of a run. The first line of the docstring is the help."""

from collections.abc import Callable

from redraft.latent import recipes as latent
from redraft.recipes import published, shipped
from redraft.recipes.stdlib import stdlib_demo, stdlib_tiny
from redraft.training.config import BaseRunConfig

_ALL: tuple[Callable[[], BaseRunConfig], ...] = (
    stdlib_tiny,
    stdlib_demo,
    shipped.sudoku,
    shipped.austen,
    shipped.stdlib_small,
    shipped.stdlib_block,
    shipped.a2d_speculate,
    published.llada_sft,
    published.dream_sft,
    published.a2d_mdlm,
    published.a2d_bd3lm,
    published.bert_chat,
    published.mdlm_owt,
    published.bd3lm_owt,
    published.llada_pretrain,
    latent.latent_autoencoder,
    latent.latent_denoiser,
    latent.latent_rollout,
    latent.thought_ar,
    latent.thought_masked,
)
RECIPES = {recipe.__name__.replace("_", "-"): recipe for recipe in _ALL}
