"""Models from scratch: stock transformers architectures, bidirectional by their config alone."""

from dataclasses import dataclass, fields
from typing import Any

from redraft.errors import unknown_name
from redraft.models.settings import DiffusionSettings

DEFAULT_MAX_POSITIONS = 2048


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a random model (a size, or explicit numbers that overrule it), or the model to go on from."""

    start: str | None = None
    """Folder or hub id of a diffusion model to go on from (`redraft convert` makes one); brings shape and tokenizer."""
    quantization: str | None = None
    """Hold the frozen weights of start in 4 bits (nf4) or 8 (int8) under an adapter (QLoRA)."""
    size: str = "5m"
    """Named shape: 1m, 5m, 14m, 30m, 135m (counted at a vocabulary of 4 k to 8 k; 135m at 49 k)."""
    architecture: str = "llama"
    """Stock transformers architecture: llama or modernbert."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    num_layers: int | None = None
    """Transformer layers."""
    num_heads: int | None = None
    """Attention heads."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer."""
    max_positions: int | None = None
    """Longest sequence the model takes, in tokens; by default the windows it is trained on."""
    dropout: float = 0.0
    """Attention dropout, as a probability."""

    def __post_init__(self) -> None:
        if self.start is not None and (given := [f"model.{name}" for name in self._shape_given()]):
            raise ValueError(
                f"model.start brings its own shape; got {', '.join(given)} beside it. Leave out one or the other."
            )
        if self.size not in _SHAPES:
            raise unknown_name("model.size", self.size, _SHAPES)
        if self.architecture not in _ARCHITECTURES:
            raise unknown_name("model.architecture", self.architecture, _ARCHITECTURES)
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} must be at least 1; got {value}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is a probability in [0, 1); got {self.dropout}.")
        shape = self.shape
        if shape.hidden_size % shape.num_heads:
            raise ValueError(
                f"model.num_heads must divide model.hidden_size; got {shape.num_heads} heads and {shape.hidden_size}."
            )

    def _shape_given(self) -> list[str]:
        others = [field for field in fields(self) if field.name not in ("start", "quantization")]
        return [field.name for field in others if getattr(self, field.name) != field.default]

    @property
    def shape(self) -> "Shape":
        """The numbers of the named size, with the explicit ones in their place."""
        named = _SHAPES[self.size]
        return Shape(
            hidden_size=self.hidden_size or named.hidden_size,
            num_layers=self.num_layers or named.num_layers,
            num_heads=self.num_heads or named.num_heads,
            intermediate_size=self.intermediate_size or named.intermediate_size,
            num_key_value_heads=named.num_key_value_heads,
        )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Numbers of a transformer."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_key_value_heads: int | None = None


_SHAPES = {
    "1m": Shape(hidden_size=128, num_layers=4, num_heads=2, intermediate_size=352),
    "5m": Shape(hidden_size=256, num_layers=6, num_heads=4, intermediate_size=672),
    "14m": Shape(hidden_size=384, num_layers=6, num_heads=6, intermediate_size=1024),
    "30m": Shape(hidden_size=512, num_layers=8, num_heads=8, intermediate_size=1376),
    "135m": Shape(hidden_size=576, num_layers=30, num_heads=9, intermediate_size=1536, num_key_value_heads=3),
}


def build_model(config: ModelConfig, settings: DiffusionSettings, *, tokenizer: Any) -> Any:
    """Build a random transformers model for a tokenizer, with `settings` in its config."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    family_config = _ARCHITECTURES[config.architecture](config, len(tokenizer), tokenizer)
    settings.save_to(family_config)
    auto = AutoModelForCausalLM if config.architecture == "llama" else AutoModelForMaskedLM
    return auto.from_config(family_config)


def _llama(config: ModelConfig, vocab_size: int, tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    shape = config.shape
    heads = shape.num_key_value_heads
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=heads if heads and shape.num_heads % heads == 0 else shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=config.max_positions or DEFAULT_MAX_POSITIONS,
        attention_dropout=config.dropout,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _modernbert(config: ModelConfig, vocab_size: int, tokenizer: Any) -> Any:
    from transformers import ModernBertConfig

    shape = config.shape
    return ModernBertConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=config.max_positions or DEFAULT_MAX_POSITIONS,
        attention_dropout=config.dropout,
        layer_types=["full_attention"] * shape.num_layers,  # every token of a canvas may inform every other: no windows
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=None,
        sep_token_id=None,
    )


_ARCHITECTURES = {"llama": _llama, "modernbert": _modernbert}
