"""Latent thinking in three stages and its baselines in words, on countdown (docs/latent-thinking.md)."""

from dataclasses import replace

from redraft.data.config import DataConfig
from redraft.latent.config import WORDS, LatentRunConfig
from redraft.models.config import ModelConfig
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig

TRAIN = TrainConfig(weight_decay=0.01, precision="float32")


def latent_autoencoder() -> LatentRunConfig:
    """Train an autoencoder of blocks of thought: a minute or two on one core."""
    train = replace(TRAIN, learning_rate=4e-3, batch_size=512, max_steps=2000, decay="cosine")
    return LatentRunConfig(out="runs/latent-autoencoder", stage="autoencoder", train=train)


def latent_denoiser() -> LatentRunConfig:
    """Train a denoiser of thoughts, each given the true thoughts before it: at most 20 minutes on one core."""
    train = replace(TRAIN, learning_rate=3e-3, batch_size=128, max_steps=6000, max_minutes=20.0)
    train = replace(train, optimizer="muon", ema_decay=0.995)
    return LatentRunConfig(out="runs/latent-denoiser", stage="denoiser", start="runs/latent-autoencoder", train=train)


def latent_rollout() -> LatentRunConfig:
    """Train a denoiser on thoughts that it samples, with the nearest true ones as targets: at most 10 minutes."""
    train = replace(latent_denoiser().train, learning_rate=1e-3, batch_size=64, max_steps=1000, max_minutes=10.0)
    return LatentRunConfig(out="runs/latent-rollout", stage="rollout", start="runs/latent-denoiser", train=train)


def thought_ar() -> RunConfig:
    """Train an autoregressive model as large as the denoiser to write thoughts in words: 6 minutes on one core."""
    return RunConfig(
        out="runs/thought-ar",
        data=DataConfig(kind=WORDS, source="countdown", seq_len=64),
        model=ModelConfig(size="1m,heads=4,intermediate=512"),
        objective=ObjectiveConfig(kind="ar"),
        train=replace(latent_denoiser().train, learning_rate=2e-3, max_steps=1500, max_minutes=None, compile="off"),
    )


def thought_masked() -> RunConfig:
    """Train masked diffusion on thoughts in words, as large as the denoiser: 6 minutes on one core."""
    return replace(thought_ar(), out="runs/thought-masked", objective=ObjectiveConfig())
