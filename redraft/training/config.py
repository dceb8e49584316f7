"""The whole configuration of a training run: a recipe returns it, flags change it, the run's folder keeps it."""

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

RECIPE_FILE = "recipe.json"
DEFAULT_STEPS = 1000
PLACES = ("start", "source", "tokenizer")
"""Settings with a path that a run reads: the files may be moved before it is resumed."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Optimisation, evaluation and checkpoints."""

    section: ClassVar[str] = "train"
    renamed: ClassVar = {"keep_checkpoints": "max_checkpoints"}
    removed: ClassVar = {
        "eval_windows": (..., "train.max_validation_windows limits every evaluation"),
        "final_eval_windows": (..., "train.max_validation_windows limits every evaluation"),
        "eval_every": (..., "every checkpoint is evaluated (train.save_every)"),
        "log_every": (..., "the interval follows from train.max_steps"),
        "max_grad_norm": (1.0, "gradients are always clipped to norm 1"),
        "max_skipped": (10, "a run always stops after 10 skipped steps"),
        "attention": (..., "it is chosen by the device; train.compile off does without flex attention"),
        "device": (..., "CUDA_VISIBLE_DEVICES= trains on the CPU"),
        "report_to": (..., "log.jsonl holds every number"),
    }

    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon trains the matrices of the layers and AdamW the rest, with one learning rate and weight decay; not for
    sharded weights."""
    batch_size: Count = 32
    """Windows in a forward pass, over all processes: the number of processes changes no result."""
    accumulation: Count = 1
    """Forward passes per optimizer step."""
    max_steps: Annotated[int, Within("[1, inf)")] = DEFAULT_STEPS
    """Optimizer steps."""
    epochs: Positive | None = None
    """Passes over the training windows, in place of max_steps."""
    max_minutes: Positive | None = None
    """Time limit of the whole command (preparing and evaluating included): the number of steps and the learning rate
    follow the pace of the machine, so that the run is finished in time."""
    warmup: Fraction = 0.05
    """Fraction of the steps in which the learning rate rises from 0."""
    decay: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls to 0 after the warm-up; constant: not at all."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay (not on norms and biases)."""
    beta_2: Fraction = 0.98
    """AdamW's second-moment decay."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype; auto: bfloat16 if this device multiplies faster in it."""
    compile: Literal["auto", "off"] = "auto"
    """auto: use torch.compile if there is a compiler and it saves more time than it takes, and flex attention on CUDA.
    off: neither."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer and compute the others again in the backward pass: less memory, a third slower."""
    ema_decay: Annotated[float, Within("(0, 1)")] | None = None
    """Decay per step of an exponential moving average of the weights, which is evaluated and saved in their place."""
    save_every: Annotated[int, Within("[1, inf)")] = 500
    """Steps between checkpoints; each is evaluated on validation windows."""
    max_checkpoints: Count = 2
    """Checkpoints to keep; older ones are deleted."""
    max_validation_windows: Count | None = None
    """Validation windows per evaluation, spread evenly; by default 512, and all of them at the end."""
    seed: Seed = 0
    """Seed of the weights, the order of the data and the noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.max_steps != DEFAULT_STEPS:
            raise ValueError(
                f"train.epochs {self.epochs:g} sets the number of steps; got train.max_steps {self.max_steps} too. "
                "Add --train.epochs None to count in steps."
            )


@dataclass(frozen=True, kw_only=True)
class BaseRunConfig(Settings):
    """What the configurations of all runs share; a run saves its configuration as recipe.json in its folder."""

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
        """The command that continues the run."""
        return f"redraft train {shlex.quote(self.out)} --resume"

    def identity(self) -> dict[str, dict[str, Any]]:
        """List the settings of model, data and objective that a checkpoint of this run was trained with."""
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
        """Read recipe.json. Raises ValueError for an invalid setting and, if `is_whole`, for a missing one."""
        saved = read_recipe(path)
        missing = [f.name for f in fields(cls) if f.name not in saved]
        if is_whole and missing:
            raise ValueError(
                f"{path} has no {missing[0]!r}, so it was edited or damaged. Put the setting back, or start a new run "
                "with another --out."
            )
        return from_dict(cls, saved, where=str(path))


Run = TypeVar("Run", bound=BaseRunConfig)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the settings in a recipe.json as they are. Raises ValueError for a file without settings."""
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
    """Where the text comes from and how it becomes windows of tokens."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The shape of a random model, or the model to continue from."""
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
                f"an adapter needs a model to adapt; got adapter.rank {rank} without model.start. Add --model.start."
            )
        if quantization is not None and not rank:
            raise ValueError(
                f"quantised weights cannot be trained; got model.quantization {quantization!r} without an adapter. "
                "Add --adapter.rank 16, or leave out --model.quantization."
            )

    def identity(self) -> dict[str, dict[str, Any]]:
        """Add the hash of a file of examples that a kind of your own reads."""
        identity = super().identity()
        name, is_file, _ = self.data.source.partition(".jsonl")
        if ":" in self.data.kind and is_file:
            identity["examples"] = {"hash of the examples": hash_of(Path(name + is_file))[:16]}
        return identity


def from_dict(kind: Any, saved: Any, *, where: str, section: str = "") -> Any:
    """Build nested settings from a dictionary; JSON's lists become tuples. Raises ValueError for what does not fit."""
    if not isinstance(saved, dict):
        raise ValueError(f"{where} must hold an object of settings; got {type(saved).__name__}.")
    saved = {kind.renamed.get(name, name): value for name, value in saved.items()}
    removed = {name: kind.removed[name] for name in saved if name in kind.removed}
    if lost := [
        f"{section}{name}: {advice}" for name, (plain, advice) in removed.items() if plain not in (..., saved[name])
    ]:
        raise ValueError(f"{where} has settings that were removed. Delete them from the file: {'; '.join(lost)}.")
    known = {f.name: f for f in fields(kind)}
    types = get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {}
    for name, value in saved.items():
        if name in removed:
            continue
        if name not in known:
            raise unknown_name(f"setting in {where}", name, known)
        if is_dataclass(types[name]):
            values[name] = from_dict(types[name], value, where=f"{where}: {name}", section=f"{section}{name}.")
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
