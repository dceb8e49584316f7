"""The whole configuration of a stage of latent thinking: what a recipe returns and the checkpoint carries."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from redraft.data.tasks import find_task
from redraft.folders import hash_of
from redraft.latent.objective import ThoughtObjective
from redraft.latent.rollout import RolloutObjective
from redraft.processes.gaussian import GaussianDiffusion
from redraft.schedules import gaussian_schedule
from redraft.training.config import BaseRunConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderShape:
    """The autoencoder of the first stage."""

    kind: Literal["chunk", "resampler", "sentence", "thought"] = "chunk"
    """chunk: MLP; resampler and sentence: over a frozen encoder; thought: language models."""
    num_latents: int = 2
    """Vectors for each block."""
    latent_dim: int = 16
    """Width of a vector."""
    hidden_size: int = 256
    """Width of the autoencoder."""
    num_layers: int | None = None
    """Layers of encoder and of decoder; by default none for chunk (a linear code) and one for the others."""
    local: bool = False
    """Start every vector with tokens of its own, equally many for each (chunk)."""
    encoder: str | None = None
    """Folder or hub id whose tokenizer is used: of the frozen encoder (resampler, sentence), or of the causal language
    model that thought starts from, which is trained."""
    latent_noise: float = 0.5
    """Largest noise on the latents that the decoder is trained on, in standard deviations."""
    token_dropout: float = 0.0
    """Share of the tokens hidden from the encoder."""
    kl_weight: float = 1e-4
    """Weight of the KL to N(0, 1)."""

    def __post_init__(self) -> None:
        _require_positive("autoencoder", self, "num_latents", "latent_dim", "hidden_size")
        if self.num_layers is not None and self.num_layers < 0:
            raise ValueError(f"autoencoder.num_layers must not be negative; got {self.num_layers}. 0 is a linear code.")
        if not 0 <= self.token_dropout < 1:
            raise ValueError(f"autoencoder.token_dropout must be in [0, 1); got {self.token_dropout}. 0 hides nothing.")
        if self.encoder is not None and self.kind == "chunk":
            raise ValueError(f"autoencoder.encoder is not for kind chunk; got {self.encoder!r}. Leave it out.")
        if self.encoder is None and self.kind in ("resampler", "sentence"):
            raise ValueError(f"autoencoder.kind {self.kind} needs an encoder; got none. Set --autoencoder.encoder.")
        for name in ("latent_noise", "kl_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"autoencoder.{name} must be a number and not negative; got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class DenoiserShape:
    """The denoiser of the second stage."""

    hidden_size: int = 128
    """Width."""
    num_layers: int = 4
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""
    schedule: Literal["flow", "cosine", "linear-beta", "sqrt", "sigmoid"] = "flow"
    """Noise schedule."""
    shift: float = 1.0
    """Shift of the log-SNR by 2 log(shift); below 1 is noisier."""
    parametrization: Literal["x0", "eps", "v", "flow"] = "x0"
    """What the network predicts."""
    weighting: str = "inverse-t"
    """Weight of the loss over t: unit, x0, eps, v, flow, inverse-t, min-snr, sigmoid, elbo."""
    answer: Literal["autoregressive", "masked"] = "autoregressive"
    """How the answer is decoded; --objective.answer-weight 0 leaves it out."""

    def __post_init__(self) -> None:
        _require_positive("denoiser", self, "hidden_size", "num_layers", "num_heads")
        gaussian_schedule(self.schedule, shift=self.shift)


def _require_positive(section: str, shape: Any, *names: str) -> None:
    for name in names:
        if getattr(shape, name) < 1:
            raise ValueError(f"{section}.{name} must be at least 1; got {getattr(shape, name)}.")


@dataclass(frozen=True, kw_only=True)
class LatentRunConfig(BaseRunConfig):
    """One stage from data to checkpoint."""

    out: str = "runs/latent"
    """Folder of the run."""
    stage: Literal["autoencoder", "denoiser", "rollout"] = "autoencoder"
    """What is trained."""
    task: str | None = "countdown"
    """countdown, countdown-backwards, composition, sudoku, sudoku-multi, or a .jsonl of prompt, blocks, answer; none
    for one that Python hands over."""
    start: str | None = None
    """Folder of the stage before: an autoencoder for the denoiser, a denoiser for the rollout."""
    force: bool = False
    """Train on an autoencoder that fails its gate."""
    autoencoder: AutoencoderShape = field(default_factory=AutoencoderShape)
    """The autoencoder (first stage)."""
    denoiser: DenoiserShape = field(default_factory=DenoiserShape)
    """The denoiser (second stage)."""
    objective: ThoughtObjective = field(default_factory=ThoughtObjective)
    """Losses of the denoiser."""
    rollout: RolloutObjective = field(default_factory=RolloutObjective)
    """What the third stage adds."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation and bookkeeping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is not None:
            find_task(self.task)
        self._check_unused()
        if self.train.epochs is not None:
            raise ValueError(f"train.epochs is not for latent thinking; got {self.train.epochs}. Use train.max_steps.")
        if self.train.gradient_checkpointing:
            raise ValueError("train.gradient_checkpointing is not for latent thinking. Leave it out.")
        if self.stage == "autoencoder" and self.train.accumulation > 1:
            raise ValueError(
                "an autoencoder's noise is relative to the spread of a whole batch, which cannot be accumulated; got "
                f"train.accumulation {self.train.accumulation}. Raise --train.batch-size."
            )
        shape = self.denoiser
        GaussianDiffusion(parametrization=shape.parametrization, weighting=shape.weighting)
        if self.stage != "autoencoder" and self.start is None:
            before = "an autoencoder" if self.stage == "denoiser" else "a denoiser"
            raise ValueError(f"stage {self.stage} needs --start, the folder of {before}; got none.")

    def _check_unused(self) -> None:
        """Raise ValueError for settings that this stage does not read."""
        users = {
            "autoencoder": ("autoencoder",),
            "denoiser": ("denoiser",),
            "objective": ("denoiser", "rollout"),
            "rollout": ("rollout",),
        }
        for section, stages in users.items():
            own = getattr(self, section)
            if self.stage not in stages and own != type(own)():
                raise ValueError(
                    f"settings of {section} are for stage {' and '.join(stages)}; this is stage {self.stage}. Leave "
                    "them out."
                )
        if self.stage == "autoencoder" and self.start is not None:
            raise ValueError(f"an autoencoder is the first stage; got start {self.start!r}. Leave it out.")

    @property
    def resume_command(self) -> str:
        """How to go on with the run; no command can name a task that Python handed over."""
        return super().resume_command if self.task is not None else "run_stage(config, task=..., resume=True)"

    def identity(self) -> dict[str, dict[str, Any]]:
        """Add the task, its examples if a file holds them, and the weights that the stage begins from."""
        from redraft.latent.checkpoint import AUTOENCODER_FOLDER  # imports torch

        folders = [] if self.start is None else [Path(self.start), Path(self.start) / AUTOENCODER_FOLDER]
        weights = [path / "model.safetensors" for path in folders]
        hashes = [hash_of(path)[:16] for path in weights if path.exists()]
        stage = {"task": self.task, "hashes of the start": hashes}
        if self.task is not None and self.task.endswith(".jsonl"):
            stage["hash of the examples"] = hash_of(Path(self.task))[:16]
        return super().identity() | {"stage": stage}
