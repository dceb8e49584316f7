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
    """Train 2 M parameters for at most a minute and a half."""
    return RunConfig(
        out="runs/demo",
        data=DataConfig(seq_len=128, vocab_size=2048),
        model=ModelConfig(size="hidden=192,layers=4,heads=3,intermediate=512", max_positions=512),
        objective=ObjectiveConfig(t_min=0.02, t_max=0.7),  # learns to use context sooner: docs/lab-notes.md
        train=TrainConfig(
            optimizer="muon",
            learning_rate=3e-3,
            batch_size=32,
            max_steps=1000,
            max_minutes=1.5,
            save_every=1000,
            max_validation_windows=128,
        ),
    )
