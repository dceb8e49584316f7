"""Models from scratch: stock transformers architectures, bidirectional by their config alone."""

from typing import Any

from redraft.models.config import ModelConfig
from redraft.models.later import import_modelling
from redraft.models.settings import DiffusionSettings

DEFAULT_MAX_POSITIONS = 2048


def build_model(config: ModelConfig, settings: DiffusionSettings, *, tokenizer: Any) -> Any:
    """Build a random transformers model for a tokenizer, with `settings` in its config."""
    import_modelling()
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig, ModernBertConfig

    size = config.dimensions
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": config.max_positions or DEFAULT_MAX_POSITIONS,
        "attention_dropout": config.dropout,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    stock: Any
    if config.architecture == "modernbert":
        # ModernBERT's default has windows; every token of a canvas may inform every other.
        full = ["full_attention"] * size.layers
        stock = ModernBertConfig(**common, layer_types=full, cls_token_id=None, sep_token_id=None)
    else:
        groups = size.key_value_heads
        groups = groups if groups and size.heads % groups == 0 else size.heads
        stock = LlamaConfig(**common, num_key_value_heads=groups, tie_word_embeddings=True, use_cache=False)
    settings.save_to(stock)
    auto = AutoModelForMaskedLM if config.architecture == "modernbert" else AutoModelForCausalLM
    return auto.from_config(stock)
