"""The whole configuration of a stage of latent thinking: a recipe returns it, the run's folder keeps it. No torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from redraft.checkpoints import local_path
from redraft.folders import hash_of
from redraft.settings import Count, NonNegative, Positive, Seed, Settings
from redraft.training.config import BaseRunConfig

AUTOENCODER_FOLDER = "autoencoder"
WORDS = "redraft.latent.words:prepare_words"
"""`data.kind` of thoughts in words."""
CONSTANT = "no setting any more: it always has the default value of this version"
READ_BY = {"autoencoder": ("autoencoder",), "denoiser": ("denoiser",), "objective": ("denoiser", "rollout")}
"""Which stages read a section."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderShape(Settings):
    """The autoencoder of the first stage: linear, or with an encoder a resampler over it."""

    section: ClassVar[str] = "autoencoder"
    removed: ClassVar = {
        "kind": ("chunk", "an autoencoder.encoder makes a resampler"),
        "num_layers": (None, "chunk has none, a resampler one"),
        "latent_noise": (1.0, CONSTANT),
        "token_dropout": (0.0, CONSTANT),
        "kl_weight": (1e-4, CONSTANT),
    }
    num_latents: Count = 2
    """Latent vectors per block."""
    latent_dim: Count = 16
    """Width of a latent vector."""
    hidden_size: Count = 256
    """Width of the autoencoder."""
    local: bool = False
    """Initialise each latent vector as a projection of its own equal share of the tokens (without an encoder)."""
    encoder: str | None = None
    """Folder or hub id of a pretrained encoder, which stays frozen; its tokenizer is used too."""


@dataclass(frozen=True, kw_only=True)
class DenoiserShape(Settings):
    """The denoiser of the second stage."""

    section: ClassVar[str] = "denoiser"
    removed: ClassVar = {
        "schedule": ("flow", CONSTANT),
        "shift": (1.0, CONSTANT),
        "parametrization": ("x0", CONSTANT),
        "answer": ("autoregressive", CONSTANT),
    }
    hidden_size: Count = 128
    """Width of the transformer."""
    num_layers: Count = 4
    """Transformer layers."""
    num_heads: Count = 4
    """Attention heads."""
    weighting: Literal["inverse-t", "unit", "elbo"] = "inverse-t"
    """Weight of the squared error of x_0 at time t: 1 / t, 1, or that of the likelihood bound."""


@dataclass(frozen=True, kw_only=True)
class ThoughtObjective(Settings):
    """Losses of the denoiser."""

    section: ClassVar[str] = "objective"
    removed: ClassVar = {
        **dict.fromkeys(("copies", "time_mean", "time_std"), (1.0, CONSTANT)),
        **dict.fromkeys(("drop_prompt", "context_noise", "joint", "stop_weight"), (0.1, CONSTANT)),
        "self_conditioning": (0.5, CONSTANT),
    }
    answer_weight: NonNegative = 0.2
    """Weight of the answer's cross-entropy, in nats per token; 0: no answer decoder."""
    times: Literal["logit-normal", "uniform"] = "logit-normal"
    """Density of the training times, stratified over the batch; logit-normal draws more times near 1 (noise)."""


@dataclass(frozen=True, kw_only=True)
class ThinkingConfig(Settings):
    """How to think."""

    blocks: Count | None = None
    """Number of blocks of thought; by default the model's stop head decides, up to the model's largest number."""
    steps: Count = 10
    """Denoising steps for each block."""
    num_samples: Count = 1
    """Samples for each prompt."""
    solver: Literal["dpm++2m", "ddim"] = "dpm++2m"
    """dpm++2m is of second order, ddim of first; both are deterministic."""
    cfg_scale: NonNegative = 0.0
    """Classifier-free guidance: uncond + (scale + 1) (cond - uncond); 0 for none, else twice the work."""
    init_noise: Positive = 1.0
    """Standard deviation of the noise that a block starts from."""
    seed: Seed = 0
    """Seed of the noise."""


@dataclass(frozen=True, kw_only=True)
class LatentRunConfig(BaseRunConfig):
    """One stage from data to checkpoint."""

    removed: ClassVar = {
        "rollout": (
            {"steps": 5, "weight": 1.0, "thought_weight": 1.0, "answer_gradient": False},
            "five steps, equal weights, no gradient from the answer into the thoughts",
        ),
    }

    out: str = "runs/latent"
    """Folder of the run."""
    stage: Literal["autoencoder", "denoiser", "rollout"] = "autoencoder"
    """Which model is trained."""
    task: str | None = "countdown"
    """countdown, composition, sudoku, sudoku-multi, or a .jsonl file of prompt, blocks, answer. None: the task is given
    from Python."""
    start: str | None = None
    """Folder of the stage before: an autoencoder for the denoiser, a denoiser for the rollout."""
    force: bool = False
    """Train a denoiser although its autoencoder does not pass its gate."""
    autoencoder: AutoencoderShape = field(default_factory=AutoencoderShape)
    """The autoencoder (first stage)."""
    denoiser: DenoiserShape = field(default_factory=DenoiserShape)
    """The denoiser (second stage)."""
    objective: ThoughtObjective = field(default_factory=ThoughtObjective)
    """Losses of the denoiser (second and third stage)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is not None:
            from redraft.latent.tasks import find_task  # `think` needs no task

            find_task(self.task)
        for section, stages in READ_BY.items():
            shape = getattr(self, section)
            if self.stage not in stages and shape != type(shape)():
                raise ValueError(
                    f"settings of {section} are for stage {' and '.join(stages)}; this is stage {self.stage}. Leave "
                    "them out."
                )
        for name in ("epochs", "gradient_checkpointing"):
            if value := getattr(self.train, name):
                raise ValueError(f"train.{name} {value} is not for latent thinking. Leave it out.")
        if self.stage == "autoencoder" and self.train.accumulation > 1:
            raise ValueError(
                "an autoencoder's noise is relative to the spread of its batch, so batches cannot be accumulated; got "
                f"train.accumulation {self.train.accumulation}. Raise --train.batch-size."
            )
        if self.stage == "autoencoder" and self.start is not None:
            raise ValueError(f"an autoencoder is the first stage; got start {self.start!r}. Leave it out.")
        if self.stage != "autoencoder" and self.start is None:
            before = "an autoencoder" if self.stage == "denoiser" else "a denoiser"
            raise ValueError(f"stage {self.stage} needs --start, the folder of {before}; got none.")

    @property
    def resume_command(self) -> str:
        """What continues this run; no command can name a task that Python passed."""
        return super().resume_command if self.task is not None else "run_stage(config, task=..., resume=True)"

    def identity(self) -> dict[str, dict[str, Any]]:
        """Add the task, the examples of its file, and the weights that the stage starts from."""
        start = None if self.start is None else Path(local_path(self.start))
        folders = [] if start is None else [start, start / AUTOENCODER_FOLDER]
        weights = [path for folder in folders if (path := folder / "model.safetensors").exists()]
        stage = {"task": self.task, "hashes of the start": [hash_of(path)[:16] for path in weights]}
        if self.task is not None and self.task.endswith(".jsonl"):
            stage["hash of the examples"] = hash_of(Path(self.task))[:16]
        return super().identity() | {"stage": stage}
