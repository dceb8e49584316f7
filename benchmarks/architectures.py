"""Which architectures of the installed transformers convert: a tiny random model of each, built and measured.

python benchmarks/architectures.py

Prints the table in docs/convert.md; takes some minutes.
"""

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from redraft.models.convert import language_model_class, refusal
from redraft.models.denoiser import Denoiser
from redraft.models.probe import BIDIRECTIONAL, BLOCKS, CACHED, ISOLATED, PADDING, POSITIONS, check_model
from redraft.models.settings import DiffusionSettings

LARGEST_PARAMETERS = 30_000_000
VOCABULARY = 128
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "sliding_window": 5,  # short enough to bite on the probe's sequence, like the next three
    "attention_chunk_size": 8,
    "index_topk": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Fields that give an architecture's size, in all their spellings, and what they are for a model of a few thousand
parameters."""
LATENT_ATTENTION = {  # in place of head_dim, where keys and values are projected from a latent
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "num_key_value_heads": 4,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "ernie4_5_moe": {"moe_k": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gptj": {"rotary_dim": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}
"""Fields of single architectures that `SMALL` makes inconsistent."""
PARTS_OF_OTHERS = {"git", "mllama", "trocr", "whisper", "musicgen", "musicgen_melody", "moshi", "bert-generation"}
"""Listed by transformers among causal language models: decoders that belong to an encoder or to another modality."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture's line of the table."""

    model_type: str
    bidirectional: bool = False
    block_causal: bool = False
    cached: bool = False
    reason: str = ""
    """Why a column is no."""

    @property
    def works(self) -> bool:
        """Bidirectional, block-causal and cached."""
        return self.bidirectional and self.block_causal and self.cached


def tiny_config(model_type: str) -> Any:
    """Make the smallest config of an architecture that still has all its parts."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    fields = {name: value for name, value in SMALL.items() if name in known} | SPECIAL.get(model_type, {})
    if "qk_rope_head_dim" in known:
        fields |= {name: value for name, value in LATENT_ATTENTION.items() if name in known}
        fields.pop("head_dim", None)
    if "layer_types" in fields:
        pass
    elif len(set(known.get("layer_types") or ())) > 1:
        kinds = list(dict.fromkeys(known["layer_types"]))
        fields |= {"layer_types": kinds} | {name: len(kinds) for name in ("num_hidden_layers",) if name in known}
    elif known.get("layer_types"):
        fields["layer_types"] = known["layer_types"][:1] * 2
    return config_class(**fields)


def architectures() -> list[str]:
    """List the decoder-only architectures of the installed transformers."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(MODEL_FOR_MASKED_LM_MAPPING_NAMES) - PARTS_OF_OTHERS
    return sorted(name for name in names if not getattr(CONFIG_MAPPING[name], "is_encoder_decoder", False))


def measure(model_type: str) -> Row:
    """Build and check one architecture; whatever goes wrong is its reason."""
    try:
        return _measure(model_type)
    except Exception as error:  # one architecture that fails in its own way must not end the table
        reason = " ".join(str(error).split())[:90]
        return Row(model_type=model_type, reason=f"not measured: {type(error).__name__}: {reason}")


def _measure(model_type: str) -> Row:
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[model_type]()
    model_class = language_model_class(default)
    reason = refusal(default, model_class)
    config = default if reason else tiny_config(model_type)
    if reason := reason or refusal(config, model_class):
        return Row(model_type=model_type, reason=reason)
    settings = DiffusionSettings(mask_token_id=3)
    settings.save_to(config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST_PARAMETERS:
        return Row(model_type=model_type, reason=f"not measured: its smallest config has {size:,} parameters")
    model = _random_model(model_class, config)
    Denoiser(model, settings).logits(torch.arange(4, 12)[None])  # a tiny config that does not fit together ends here
    results = {check.claim: check for check in check_model(model, settings)}
    failed = next((check for check in results.values() if not check.passed), None)
    bidirectional = all(results[claim].passed for claim in (BIDIRECTIONAL, POSITIONS, ISOLATED, PADDING))
    blocks = bidirectional and results[BLOCKS].passed
    return Row(
        model_type=model_type,
        bidirectional=bidirectional,
        block_causal=blocks,
        cached=blocks and results[CACHED].passed,
        reason="" if failed is None else f"not true that {failed.claim}: {failed.measured[:90]}",
    )


def _random_model(model_class: Any, config: Any) -> Any:
    """Build a model whose random weights are large enough for every dependence to show."""
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def table(rows: list[Row]) -> str:
    """Write the rows as a markdown table, and their count."""
    lines = ["| architecture | bidirectional | block-causal | cached | reason |", "|---|---|---|---|---|"]
    for row in rows:
        marks = ("yes" if mark else "no" for mark in (row.bidirectional, row.block_causal, row.cached))
        lines.append(f"| {' | '.join((row.model_type, *marks, row.reason.replace('|', '/')))} |")
    counts = f"{sum(row.works for row in rows)} of {len(rows)} architectures work fully"
    return "\n".join([*lines, "", f"{counts}; {sum(row.bidirectional for row in rows)} as bidirectional models."])


def main() -> None:
    """Measure every architecture and print the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    print(table([measure(name) for name in architectures()]))


if __name__ == "__main__":
    main()
