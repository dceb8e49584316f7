"""Masked diffusion from scratch on the running Python's standard library."""

from redraft.data.config import DataConfig
from redraft.models.config import ModelConfig
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig


def stdlib_tiny() -> RunConfig:
    """Train 1 M parameters for some seconds, to see that everything works."""
    return RunConfig(
        out="runs/stdlib-tiny",
        data=DataConfig(seq_len=64, vocab_size=1024, max_documents=40, validation_fraction=0.2),
        model=ModelConfig(size="1m", max_positions=512),
        train=TrainConfig(learning_rate=2e-3, batch_size=16, max_steps=60, save_every=30),
    )


def stdlib_demo() -> RunConfig:
    """Train 5 M parameters for at most 5 minutes on 2 cores."""
    return RunConfig(
        out="runs/demo",
        data=DataConfig(seq_len=256, vocab_size=4096),
        model=ModelConfig(size="5m"),
        objective=ObjectiveConfig(t_min=0.02, t_max=0.7),  # learns to use context sooner: docs/lab-notes.md
        train=TrainConfig(learning_rate=1e-3, batch_size=32, max_steps=600, max_minutes=4.8, save_every=200),
    )
