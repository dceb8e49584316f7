"""The whole configuration of a training run: what a recipe returns, flags change, and the checkpoint carries."""

import dataclasses
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from redraft.data.config import DataConfig
from redraft.errors import fits, type_names, unknown_name
from redraft.likelihood.config import ObjectiveConfig
from redraft.models.build import ModelConfig
from redraft.models.quantize import UNDER_ADAPTERS
from redraft.training.adapter import AdapterConfig
from redraft.training.checkpoint import RECIPE_FILE, write_whole


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation, evaluation and bookkeeping."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the layers by Muon, at the learning rate and weight decay of AdamW, which trains the rest;
    not for sharded weights."""
    batch_size: int = 32
    """Windows in a forward pass, all processes together: how many share them changes no result."""
    accumulation: int = 1
    """Forward passes per optimizer step."""
    max_steps: int = 1000
    """Optimizer steps."""
    epochs: float | None = None
    """Passes over the training windows, in place of max_steps."""
    max_minutes: float | None = None
    """Fit the run into this time: a measurement before the start lowers max_steps, and a clock stops the rest."""
    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises."""
    decay: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay (not on norms and biases)."""
    beta_2: float = 0.98
    """AdamW's second-moment decay."""
    max_grad_norm: float = 1.0
    """Gradient clipping, global norm."""
    max_skipped: int = 10
    """Steps whose gradient is not finite are skipped and their batches kept; a run with more of them stops."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype; auto takes bfloat16 where this device multiplies faster in it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the transformer; auto compiles where a compiler is found and the run is long enough."""
    attention: Literal["auto", "mask", "pieces", "flex"] = "auto"
    """How rows attend: mask (all pairs, under a mask), pieces (leaving out what no query sees), flex (torch's, on
    CUDA). auto: flex on CUDA where it can be had, pieces on a CPU, else mask."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer and compute the others again in the backward pass: less memory, a third slower."""
    ema_decay: float | None = None
    """Average the weights with this decay per step; evaluation and the saved model then use the average."""
    eval_every: int = 500
    """Steps between evaluations (and at the end); 0 for none before the end."""
    eval_windows: int = 512
    """Held-out windows per evaluation, spread evenly."""
    final_eval_windows: int | None = None
    """Held-out windows of the evaluation at the end, spread evenly; by default all of them."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    log_every: int = 10
    """Steps between log lines."""
    seed: int = 0
    """Seed of the weights, the order of the data and the noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes an accelerator if there is one."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Loggers of transformers beside console and log.jsonl: tensorboard, wandb, trackio."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "accumulation",
            "max_steps",
            "eval_windows",
            "final_eval_windows",
            "save_every",
            "keep_checkpoints",
            "log_every",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1; got {value}.")
        if self.max_skipped < 0:
            raise ValueError(f"train.max_skipped must not be negative; got {self.max_skipped}. Use 0 to allow none.")
        if self.eval_every < 0:
            raise ValueError(f"train.eval_every must not be negative; got {self.eval_every}. Use 0 for the end only.")
        for name in ("learning_rate", "max_minutes", "epochs"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"train.{name} must be positive, and finite; got {value}.")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} must not be negative, and finite; got {getattr(self, name)}.")
        if not 0 <= self.beta_2 < 1:
            raise ValueError(f"train.beta_2 must lie in [0, 1); got {self.beta_2}. 0.98 is ours, 0.999 is usual.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed must lie in [0, 2**32); got {self.seed}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"train.warmup is a fraction of the steps in [0, 1); got {self.warmup}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"train.ema_decay must lie in (0, 1); got {self.ema_decay}. Leave it out for no average.")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A configuration that the folder of its run keeps."""

    def save(self, folder: Path) -> None:
        """Write recipe.json, which `redraft train FOLDER/recipe.json --out OTHER` runs again."""
        write_whole(folder / RECIPE_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path, *, is_whole: bool = False) -> Any:
        """Read recipe.json. Raises ValueError that names what does not fit, and where `is_whole` what is missing."""
        saved = read_recipe(path)
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in saved]
        if is_whole and missing:
            raise ValueError(
                f"{path} has no {missing[0]!r}, which it had when it was written: it was edited or damaged. Put it "
                "back, or start a new run with another --out."
            )
        return from_dict(cls, saved, where=str(path))


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the settings in a recipe.json as they stand there. Raises ValueError for a file that holds none."""
    try:
        saved = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable recipe: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} must hold an object of settings; got {type(saved).__name__}.")
    return saved


def check_out(out: str) -> None:
    """Raise ValueError for a folder that cannot be written: safetensors and tokenizers take UTF-8 names only."""
    if not out:
        raise ValueError("out must name the folder of the run; got ''.")
    if "\0" in out or any(0xD800 <= ord(character) < 0xE000 for character in out):
        raise ValueError(f"out must be a name in UTF-8; got {out!a}. Choose another --out.")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Recorded):
    """One training run from data to checkpoint."""

    out: str = "runs/model"
    """Folder of the run: model, tokenizer, checkpoints, logs, loss curve."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where the text comes from and how it is cut."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The shape of a random model, or the model to go on from."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised: the noising process, its layout and its weights."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA over the frozen weights of model.start; rank 0 trains all weights instead."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation, evaluation and bookkeeping."""

    def __post_init__(self) -> None:
        check_out(self.out)
        if self.objective.kind == "block" and (self.objective.block_size or 0) > self.data.seq_len:
            raise ValueError(
                f"objective.block_size must not exceed data.seq_len; got {self.objective.block_size} and "
                f"{self.data.seq_len}. Lower it."
            )
        if self.model.start is not None and self.data.tokenizer is not None:
            raise ValueError(
                f"model.start brings its own tokenizer; got data.tokenizer={self.data.tokenizer!r} beside it. Leave "
                "out one or the other."
            )
        if self.data.kind == "thought":
            self._check_thought()
        self._check_adapter()
        if self.model.max_positions is not None and self.data.seq_len > self.model.max_positions:
            raise ValueError(
                f"data.seq_len must not exceed model.max_positions; got {self.data.seq_len} and "
                f"{self.model.max_positions}. Raise --model.max-positions."
            )
        if self.objective.kind == "ar" and self.model.architecture == "modernbert":
            raise ValueError(
                "objective.kind ar needs a decoder; got model.architecture modernbert, an encoder. Use llama."
            )

    def _check_thought(self) -> None:
        if self.model.start is not None:
            raise ValueError(
                f"kind thought makes a tokenizer of the task's words; got model.start {self.model.start!r}, which "
                "brings its own. Leave it out."
            )
        if self.objective.fills_rows and not self.data.thought.fill:
            raise ValueError(
                f"objective.kind {self.objective.kind} fills a canvas of one length; got data.thought.fill False, by "
                "which the length of a row tells that of its answer. Add --data.thought.fill."
            )

    def _check_adapter(self) -> None:
        rank, quantization = self.adapter.rank, self.model.quantization
        if rank and self.model.start is None:
            raise ValueError(
                f"an adapter goes over model.start; got adapter.rank {rank} without. Name a --model.start."
            )
        if quantization not in (None, *UNDER_ADAPTERS):
            raise unknown_name("model.quantization for training", quantization, UNDER_ADAPTERS)
        if quantization is not None and not rank:
            raise ValueError(
                f"quantised weights cannot be trained; got model.quantization {quantization!r} without an adapter. "
                "Add --adapter.rank 16, or leave it out."
            )


def from_dict(kind: Any, saved: Any, *, where: str) -> Any:
    """Build nested dataclasses from a dictionary; JSON's lists become tuples."""
    if not isinstance(saved, dict):
        raise ValueError(f"{where} must hold an object of settings; got {type(saved).__name__}.")
    known = {f.name: f for f in dataclasses.fields(kind)}
    types = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in saved.items():
        if name not in known:
            raise unknown_name(f"setting in {where}", name, known)
        nested = types[name]
        if dataclasses.is_dataclass(nested):
            values[name] = from_dict(nested, value, where=f"{where}: {name}")
            continue
        values[name] = tuple(value) if isinstance(value, list) else value
        if not fits(values[name], nested):
            raise ValueError(f"{where}: {name} must be one of {type_names(nested)}; got {value!r}. Mend the file.")
    return kind(**values)


def differences(old: Any, new: Any) -> list[str]:
    """List the settings in which two runs differ, as `section.name: old -> new`."""
    a, b = _flat(asdict(old)), _flat(asdict(new))
    return [f"{name}: {a[name]!r} -> {b[name]!r}" for name in a if a[name] != b[name]]


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
