"""Checkpoints that ship with the package: at most 100 minutes on 2 cores each, from random weights."""

from dataclasses import replace

from redraft.data.config import GRIDS, DataConfig
from redraft.models.config import AdapterConfig, ModelConfig
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig

TRAIN = TrainConfig(
    optimizer="muon",  # docs/lab-notes.md, "Recipes of the shipped checkpoints"
    learning_rate=2e-3,
    batch_size=32,
    max_steps=20_000,
    max_minutes=95.0,
    save_every=500,
)


def sudoku() -> RunConfig:
    """Train 0.8 M parameters on solved sudoku grids of 4 x 4, for minutes: a puzzle is a grid with masked cells."""
    return RunConfig(
        out="runs/sudoku",
        data=DataConfig(kind=GRIDS, source="4", seq_len=19),
        model=ModelConfig(size="1m,heads=4", max_positions=128),
        train=replace(TRAIN, learning_rate=3e-3, max_steps=3000, save_every=1000, weight_decay=0.01),
    )


def austen() -> RunConfig:
    """Train 5.4 M parameters on Jane Austen's novels, which `python tools/austen.py austen` writes."""
    return RunConfig(
        out="runs/austen",
        data=DataConfig(source="austen", seq_len=256, vocab_size=4096),
        model=ModelConfig(size="5m,intermediate=608"),
        train=TRAIN,
    )


def stdlib_small() -> RunConfig:
    """Train 7 M parameters to compress modules of the standard library outside of the training data."""
    return RunConfig(
        out="runs/stdlib-small",
        data=DataConfig(seq_len=256, vocab_size=4096),
        model=ModelConfig(size="hidden=288,layers=6,heads=6,intermediate=736"),
        train=TRAIN,
    )


def stdlib_block() -> RunConfig:
    """Train 4.5 M parameters to write code token by token, in blocks of 4, and speculating: with a causal context."""
    return RunConfig(
        out="runs/stdlib-block",
        data=DataConfig(seq_len=256, vocab_size=4096),
        model=ModelConfig(size="5m,layers=5,intermediate=544"),
        objective=ObjectiveConfig(kind="block", block_size=4, context="causal", ar_weight=3.3),  # docs/lab-notes.md
        train=TRAIN,
    )


def a2d_speculate() -> RunConfig:
    """Teach an autoregressive model to draft its own text, which stays what it is: a gated adapter on --model.start."""
    return RunConfig(
        out="runs/a2d-speculate",
        data=DataConfig(seq_len=256),
        model=ModelConfig(start="models/causal"),
        adapter=AdapterConfig(rank=32, alpha=32.0, gate=True, targets="all-linear"),
        objective=ObjectiveConfig(
            kind="block", block_size=5, context="causal", within="causal", t_min=1.0, distill=True
        ),
        train=TrainConfig(learning_rate=1e-3, batch_size=8, max_steps=20_000, max_minutes=95.0, weight_decay=0.0),
    )
