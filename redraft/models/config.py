"""Settings of a run's model: its shape or the model to continue from, and a LoRA over it. No torch."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from redraft.errors import unknown_name
from redraft.settings import Count, Fraction, Natural, Positive, Settings

UNDER_ADAPTERS = ("int8", "nf4")
"""Quantisations that pass a gradient to a layer's input, which adapters in earlier layers need."""


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Numbers of a transformer."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    key_value_heads: int | None = None
    """By default, and where it does not divide heads, as many as heads."""


SIZES = {
    "1m": Dimensions(hidden=128, layers=4, heads=2, intermediate=352),
    "5m": Dimensions(hidden=256, layers=6, heads=4, intermediate=672),
    "14m": Dimensions(hidden=384, layers=6, heads=6, intermediate=1024),
    "30m": Dimensions(hidden=512, layers=8, heads=8, intermediate=1376),
    "135m": Dimensions(hidden=576, layers=30, heads=9, intermediate=1536, key_value_heads=3),
}
DEFAULT_SIZE = "5m"
_NUMBERS = ("hidden", "layers", "heads", "intermediate")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """The shape of a random model, or the model to continue from."""

    section: ClassVar[str] = "model"
    removed: ClassVar = dict.fromkeys(
        ("hidden_size", "num_layers", "num_heads", "intermediate_size"),
        (None, "it is part of model.size: 1m,layers=3 or hidden=256,layers=4,heads=4,intermediate=672"),
    )

    start: str | None = None
    """Folder or hub id of a diffusion model to continue from (`redraft convert` makes one), or redraft/NAME; it brings
    its shape and its tokenizer."""
    quantization: Literal["int8", "nf4"] | None = None
    """Store the frozen weights of model.start in 4 bits (nf4) or 8 (int8), under an adapter (QLoRA)."""
    size: str = DEFAULT_SIZE
    """Shape by name (1m, 5m, 14m, 30m parameters at a vocabulary of 4 k to 8 k; 135m at 49 k), by numbers, or by a name
    and the numbers to change: 1m,layers=3 or hidden=256,layers=4,heads=4,intermediate=672."""
    architecture: Literal["llama", "modernbert"] = "llama"
    """Stock transformers architecture: llama (a decoder) or modernbert (an encoder)."""
    max_positions: Count | None = None
    """Longest sequence that the model takes, in tokens; by default the length of its training windows."""
    dropout: Fraction = 0.0
    """Attention dropout, as a probability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = [field for field in fields(self) if field.name not in ("start", "quantization")]
        given = [f"model.{field.name}" for field in shape if getattr(self, field.name) != field.default]
        if self.start is not None and given:
            raise ValueError(
                f"model.start brings its own shape; got {', '.join(given)} beside it. Leave out one or the other."
            )
        size = self.dimensions
        if size.hidden % size.heads:
            raise ValueError(f"model.size: heads must divide hidden; got {size.heads} heads and {size.hidden}.")

    @property
    def dimensions(self) -> Dimensions:
        """The numbers that `size` stands for. Raises ValueError for a text that is no size."""
        name, *changes = self.size.replace(" ", "").split(",")
        if "=" in name:
            name, changes = DEFAULT_SIZE, [name, *changes]
        if name not in SIZES:
            raise unknown_name("model.size", name, SIZES)
        numbers = {}
        for change in changes:
            what, _, number = change.partition("=")
            if what not in _NUMBERS or not number.isdecimal() or int(number) < 1:
                raise ValueError(
                    "model.size must be a name, or positive numbers such as hidden=256,layers=4,heads=4,"
                    f"intermediate=672; got {change!r} in {self.size!r}."
                )
            numbers[what] = int(number)
        return replace(SIZES[name], **numbers)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Settings):
    """LoRA over the frozen weights of model.start; rank 0 trains all weights instead."""

    section: ClassVar[str] = "adapter"
    removed: ClassVar = {"dropout": (0.0, "adapters have no dropout")}

    rank: Natural = 0
    """Rank of the matrices that are trained (LoRA); 0 trains all weights."""
    alpha: Positive = 32.0
    """The product of the matrices is scaled by alpha / rank."""
    targets: str = "auto"
    """Linear layers to adapt: names by commas (q_proj,v_proj), all-linear (all but the head), or auto (peft's for the
    architecture, else all-linear)."""
    gate: bool = False
    """Let the adapter act on the tokens of open blocks alone: the text of an autoregressive model.start then stays what
    it is, and the adapter learns to draft it (preset speculate)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate and not self.rank:
            raise ValueError("adapter.gate needs an adapter; got adapter.rank 0. Set the rank.")
