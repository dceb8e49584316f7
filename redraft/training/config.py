"""The whole configuration of a training run: what a recipe returns, flags change, and the checkpoint carries."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from redraft.data.config import DataConfig
from redraft.errors import unknown_name
from redraft.folders import hash_of, write_whole
from redraft.likelihood.config import ObjectiveConfig
from redraft.models.config import AdapterConfig, ModelConfig
from redraft.settings import Count, Fraction, NonNegative, Positive, Seed, Settings, Within, check_field
from redraft.training.old_settings import with_new_names

RECIPE_FILE = "recipe.json"
DEFAULT_STEPS = 1000
PLACES = ("start", "source", "tokenizer")
"""Settings that say where a run reads something: the files may be moved before it is resumed."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Optimisation, evaluation and checkpoints."""

    section: ClassVar[str] = "train"

    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the layers by Muon, at the learning rate and weight decay of AdamW, which trains the rest;
    not for sharded weights."""
    batch_size: Count = 32
    """Windows in a forward pass, all processes together: how many share them changes no result."""
    accumulation: Count = 1
    """Forward passes per optimizer step."""
    max_steps: Annotated[int, Within("[1, inf)")] = DEFAULT_STEPS
    """Optimizer steps."""
    epochs: Positive | None = None
    """Passes over the training windows, in place of max_steps."""
    max_minutes: Positive | None = None
    """Fit the run into this time: a measurement before the start lowers max_steps, and a clock stops the rest."""
    warmup: Fraction = 0.05
    """Fraction of the steps in which the learning rate rises."""
    decay: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay (not on norms and biases)."""
    beta_2: Fraction = 0.98
    """AdamW's second-moment decay."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype; auto takes bfloat16 where this device multiplies faster in it."""
    compile: Literal["auto", "off"] = "auto"
    """auto: torch.compile of the transformer where a compiler is available and the run is long enough, and flex
    attention on CUDA. off: neither."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer and compute the others again in the backward pass: less memory, a third slower."""
    ema_decay: Annotated[float, Within("(0, 1)")] | None = None
    """Average the weights with this decay per step; evaluation and the saved model then use the average."""
    save_every: Annotated[int, Within("[1, inf)")] = 500
    """Steps between checkpoints; each is evaluated on validation windows."""
    max_checkpoints: Count = 2
    """Checkpoints that are kept; older ones are deleted."""
    max_validation_windows: Count | None = None
    """Validation windows per evaluation, spread evenly; by default 512, and all of them at the end."""
    seed: Seed = 0
    """Seed of the weights, the order of the data and the noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.max_steps != DEFAULT_STEPS:
            raise ValueError(
                f"train.epochs {self.epochs:g} decides the number of steps; got train.max_steps {self.max_steps} too. "
                "Add --train.epochs None to count in steps."
            )


@dataclass(frozen=True, kw_only=True)
class BaseRunConfig(Settings):
    """What the configurations of all runs share; the folder of a run keeps its own in recipe.json."""

    out: str = "runs/model"
    """Folder of the run: model, tokenizer, checkpoints, logs, loss curve."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation, evaluation and checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out:
            raise ValueError("out must name the folder of the run; got ''.")
        if "\0" in self.out or any(0xD800 <= ord(character) < 0xE000 for character in self.out):
            raise ValueError(f"out must be a name in UTF-8; got {self.out!a}. Choose another --out.")

    @property
    def resume_command(self) -> str:
        """How to go on with the run."""
        return f"redraft train {shlex.quote(self.out)} --resume"

    def identity(self) -> dict[str, dict[str, Any]]:
        """List what a checkpoint must have been trained with to be of this run: model, data and objective."""
        sections = {name: values for name, values in asdict(self).items() if name not in ("train", "adapter")}
        return {
            section: {k: v for k, v in values.items() if k not in PLACES and not isinstance(v, dict)}
            for section, values in json.loads(json.dumps(sections)).items()
            if isinstance(values, dict)
        }

    def save(self, folder: Path) -> None:
        """Write recipe.json, which `redraft train FOLDER/recipe.json --out OTHER` runs again."""
        write_whole(folder / RECIPE_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path, *, is_whole: bool = False) -> Any:
        """Read recipe.json. Raises ValueError that names what does not fit, and where `is_whole` what is missing."""
        saved = read_recipe(path)
        missing = [f.name for f in fields(cls) if f.name not in saved]
        if is_whole and missing:
            raise ValueError(
                f"{path} has no {missing[0]!r}, which it had when it was written: it was edited or damaged. Put it "
                "back, or start a new run with another --out."
            )
        return from_dict(cls, with_new_names(saved, where=str(path)), where=str(path))


Run = TypeVar("Run", bound=BaseRunConfig)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the settings in a recipe.json as they stand there. Raises ValueError for a file that holds none."""
    try:
        saved = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable recipe: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} must hold an object of settings; got {type(saved).__name__}.")
    return saved


@dataclass(frozen=True, kw_only=True)
class RunConfig(BaseRunConfig):
    """One training run from data to checkpoint."""

    data: DataConfig = field(default_factory=DataConfig)
    """Where the text comes from and how it is cut."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The shape of a random model, or the model to go on from."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised: the noising process, its layout and its weights."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA over the frozen weights of model.start; rank 0 trains all weights instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective.kind == "block" and (self.objective.block_size or 0) > self.data.seq_len:
            raise ValueError(
                f"objective.block_size must not exceed data.seq_len; got {self.objective.block_size} and "
                f"{self.data.seq_len}. Lower it."
            )
        if self.model.start is not None and self.data.tokenizer is not None:
            other = f"data.tokenizer {self.data.tokenizer!r}"
            raise ValueError(f"model.start brings its own tokenizer; got {other} beside it. Leave one of them out.")
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

    def _check_adapter(self) -> None:
        rank, quantization = self.adapter.rank, self.model.quantization
        if rank and self.model.start is None:
            raise ValueError(
                f"an adapter goes over model.start; got adapter.rank {rank} without. Name a --model.start."
            )
        if quantization is not None and not rank:
            raise ValueError(
                f"quantised weights cannot be trained; got model.quantization {quantization!r} without an adapter. "
                "Add --adapter.rank 16, or leave it out."
            )

    def identity(self) -> dict[str, dict[str, Any]]:
        """Add the file of rows that a kind of your own makes anew each time."""
        identity = super().identity()
        name, is_file, _ = self.data.source.partition(".jsonl")
        if ":" in self.data.kind and is_file:
            identity["examples"] = {"hash of the examples": hash_of(Path(name + is_file))[:16]}
        return identity


def from_dict(kind: Any, saved: Any, *, where: str) -> Any:
    """Build nested settings from a dictionary; JSON's lists become tuples. Raises ValueError for what does not fit."""
    if not isinstance(saved, dict):
        raise ValueError(f"{where} must hold an object of settings; got {type(saved).__name__}.")
    known = {f.name: f for f in fields(kind)}
    types = get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {}
    for name, value in saved.items():
        if name not in known:
            raise unknown_name(f"setting in {where}", name, known)
        if is_dataclass(types[name]):
            values[name] = from_dict(types[name], value, where=f"{where}: {name}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
            check_field(f"{where}: {name}", values[name], types[name])
    return kind(**values)


def differences(old: Any, new: Any) -> list[str]:
    """List the settings in which two runs differ, as `section.name: old -> new`."""
    a, b = dict(_flat(asdict(old))), dict(_flat(asdict(new)))
    return [f"{name}: {a[name]!r} -> {b[name]!r}" for name in a if a[name] != b[name]]


def _flat(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
