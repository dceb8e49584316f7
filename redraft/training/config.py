"""The whole configuration of a training run: what a recipe returns, flags change, and the checkpoint carries."""

import dataclasses
import json
import math
import shlex
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

from redraft.data.config import DataConfig
from redraft.errors import fits, type_names, unknown_name
from redraft.layouts import Layout
from redraft.likelihood.objectives.autoregressive import Autoregressive
from redraft.likelihood.objectives.block import BlockDiffusion
from redraft.likelihood.objectives.diffusion import Diffusion
from redraft.likelihood.problem import SMALLEST_T, Objective
from redraft.models.build import ModelConfig
from redraft.models.quantize import UNDER_ADAPTERS
from redraft.models.settings import DiffusionSettings
from redraft.processes.masked import MaskedDiffusion
from redraft.processes.noised import Process
from redraft.processes.uniform import UniformDiffusion
from redraft.schedules import schedule_from_name
from redraft.training.adapter import AdapterConfig
from redraft.training.checkpoint import RECIPE_FILE, hash_of, write_whole

KINDS = ("masked", "uniform", "block", "ar")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised: the noising process, its layout and its weights."""

    kind: str = "masked"
    """masked (MDLM, LLaDA), uniform (UDLM, Duo), block (BD3LM), ar (autoregressive), or one's own as MODULE:CLASS."""
    block_size: int | None = None
    """Tokens in a block; kind block needs it."""
    smallest_block: int | None = None
    """Draw each step's block size among this, its doubles, and block_size, to sample with any of them; kind block."""
    complementary: bool = False
    """Take each row twice, under a mask and under its complement: twice the work, less variance. masked, block."""
    weighting: Literal["bound", "cart"] = "bound"
    """Weight of a noised token: that of the likelihood bound, or Dream's by the clean tokens near it. cart: masked."""
    cart_p: float = 0.1
    """How fast a clean token's part in the cart weight falls with distance, in (0, 1]."""
    schedule: str = "linear"
    """Noise schedule: linear, log-linear, cosine, polynomial (power 2), geometric."""
    t_min: float = 1e-3
    """Smallest time drawn in training. A larger one takes away the rows of few targets and huge weights."""
    t_max: float = 1.0
    """Largest time drawn in training. (Clipped noise: arXiv 2503.09573. Evaluation always covers (0.001, 1].)"""
    exclude_mask: bool = True
    """Give the mask token probability 0 in the softmax (MDLM); LLaDA does not."""
    beta: float = 0.1
    """How strongly a preference holds the model to its start (DPO's beta; data.kind preference)."""
    num_samples: int = 8
    """Draws of time and mask per answer of a pair; all are kept for the backward pass (data.kind preference)."""

    def __post_init__(self) -> None:
        schedule_from_name(self.schedule)
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(
                f"objective.t_min and t_max must satisfy 0 <= t_min < t_max <= 1; got {self.t_min}, {self.t_max}."
            )

        if not 0 < self.beta < math.inf or self.num_samples < 1:
            raise ValueError(
                "objective.beta must be positive and finite, and num_samples at least 1; got "
                f"{self.beta}, {self.num_samples}."
            )
        self._check_kind()

    def _check_kind(self) -> None:
        """Raise ValueError for settings that this kind of objective does not have."""
        if ":" in self.kind:
            _find_class(self.kind)
            return
        if self.kind not in KINDS:
            raise unknown_name("objective.kind", self.kind, (*KINDS, "MODULE:CLASS"))
        if (self.kind == "block") != (self.block_size is not None):
            advice = "Set it, e.g. to 16." if self.kind == "block" else "Use --objective.kind block, or leave it out."
            raise ValueError(f"objective.block_size goes with kind block; got {self.block_size}, {self.kind}. {advice}")
        Layout(block_size=self.block_size)
        if self.smallest_block is not None and not 1 <= self.smallest_block <= (self.block_size or 0):
            raise ValueError(
                "objective.smallest_block must lie between 1 and block_size, of kind block; got "
                f"{self.smallest_block}, {self.block_size}."
            )
        if self.complementary and (self.kind not in ("masked", "block") or self.schedule != "linear"):
            raise ValueError(
                f"objective.complementary needs masked noise (kind masked or block) and the linear schedule; "
                f"got {self.kind}, {self.schedule}."
            )
        is_even = self.t_min + self.t_max == 1 or (self.t_min <= SMALLEST_T and self.t_max == 1)
        if self.complementary and not is_even:
            raise ValueError(
                "objective.complementary noises at t and at 1 - t, so t_min and t_max must lie evenly about 0.5; got "
                f"{self.t_min}, {self.t_max}. Take t_max = 1 - t_min."
            )
        if self.weighting == "cart" and self.kind != "masked":
            raise ValueError(f"objective.weighting cart is for kind masked; got {self.kind}. Use bound.")
        if not 0 < self.cart_p <= 1:
            raise ValueError(f"objective.cart_p must lie in (0, 1]; got {self.cart_p}.")

    @property
    def measure(self) -> str:
        """What an evaluation reports: a bound on the negative log-likelihood, or itself."""
        return "NLL" if self.kind == "ar" else "NELBO"

    def build(self, *, mask_token_id: int, vocab_size: int) -> Objective:
        """Build the objective for a model's vocabulary. One's own class is called with the same and `config=self`."""
        if ":" in self.kind:
            own: Objective = _find_class(self.kind)(config=self, mask_token_id=mask_token_id, vocab_size=vocab_size)
            return own
        if self.kind == "ar":
            return Autoregressive(mask_token_id=mask_token_id)
        schedule = schedule_from_name(self.schedule)
        process: Process = UniformDiffusion(vocab_size=vocab_size, schedule=schedule)
        if self.kind != "uniform":
            process = MaskedDiffusion(mask_token_id=mask_token_id, schedule=schedule, exclude_mask=self.exclude_mask)
        common: dict[str, Any] = {
            "process": process,
            "t_min": self.t_min,
            "t_max": self.t_max,
            "is_complementary": self.complementary,
        }
        if self.block_size is not None:
            return BlockDiffusion(block_size=self.block_size, smallest_block=self.smallest_block, **common)
        return Diffusion(cart_p=self.cart_p if self.weighting == "cart" else None, **common)

    def settings(self, mask_token_id: int) -> DiffusionSettings:
        """Say in the checkpoint what it was trained for."""
        is_ar = self.kind == "ar"
        return DiffusionSettings(
            mask_token_id=mask_token_id,
            process={"uniform": "uniform", "ar": "autoregressive"}.get(self.kind, "masked"),
            schedule=self.schedule,
            shift_logits=is_ar,
            block_size=1 if is_ar else self.block_size,
        )


def _find_class(name: str) -> Any:
    """Import MODULE:CLASS. Raises ValueError where it is not there, or is no objective."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective.kind {name} cannot be imported: {error}. Is its folder on PYTHONPATH?") from error
    if missing := [method for method in ("problem", "evaluation") if not hasattr(found, method)]:
        raise ValueError(f"objective.kind {name} is no objective: it has no {' and no '.join(missing)}.")
    return found


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

    @property
    def resume_command(self: Any) -> str:
        """What continues this run."""
        return f"redraft train {shlex.quote(self.out)} --resume"

    def inputs(self) -> dict[str, dict[str, Any]]:
        """Identify what the run reads beside its settings: a checkpoint that was trained on other inputs is refused."""
        return {}

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

    def inputs(self) -> dict[str, dict[str, Any]]:
        """Identify the file of rows that are made anew each time (own kinds of data)."""
        name, is_file, _ = self.data.source.partition(".jsonl")
        return {"examples": {"hash": hash_of(Path(name + is_file))}} if ":" in self.data.kind and is_file else {}

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
