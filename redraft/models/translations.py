"""What the families' config.json and weights are called in transformers: data for `families`."""

from typing import Any

Raw = dict[str, Any]
"""A config.json as it stands on disk."""


def flat(config: Raw) -> Raw:
    """Lay the rope parameters of a transformers 5 config beside its other fields, where older config.json have them."""
    rope = config.get("rope_parameters") or {}
    names = ("rope_theta", "partial_rotary_factor")
    return {name: value for name, value in config.items() if name != "rope_parameters"} | {
        name: rope[name] for name in names if name in rope
    }


def _require(raw: Raw, family: str, **expected: Any) -> None:
    """Refuse a variant that the stock class does not compute. A missing field stands for the expected value."""
    for name, value in expected.items():
        if raw.get(name, value) != value:
            raise ValueError(
                f"config.json: this {family} checkpoint has {name}={raw[name]!r}, and only {value!r} can be loaded."
            )


def _pick(raw: Raw, names: dict[str, str]) -> Raw:
    """Rename the fields of a config: {ours: theirs}. Fields that are not there are left to their defaults."""
    return {ours: raw[theirs] for ours, theirs in names.items() if theirs in raw}


# --- LLaDA -----------------------------------------------------------------------------------------------------------

_LLADA_FIELDS = {
    "vocab_size": "embedding_size",
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "hidden_act": "activation_type",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "attention_dropout": "attention_dropout",
    "tie_word_embeddings": "weight_tying",
}
_LLADA_FIXED = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "alibi": False,
    "rope": True,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}


def from_llada(raw: Raw) -> Raw:
    """Translate OLMo-style names into Llama's."""
    _require(raw, "LLaDA", **_LLADA_FIXED)
    fields = _pick(raw, _LLADA_FIELDS)
    fields["vocab_size"] = raw.get("embedding_size") or raw["vocab_size"]
    fields["intermediate_size"] = raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"]
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = 1 if raw.get("multi_query_attention") else raw["n_heads"]
    return fields


def to_llada(config: Raw) -> Raw:
    """Write a Llama config as LLaDA's."""
    raw = {theirs: config[ours] for ours, theirs in _LLADA_FIELDS.items() if ours in config}
    raw |= _LLADA_FIXED | {"vocab_size": config["vocab_size"], "mlp_ratio": 4, "layer_norm_with_affine": True}
    return raw | {"bias_for_layer_norm": False, "rope_full_precision": True, "block_group_size": 1}


def llada_weights() -> list[Any]:
    """Rename LLaDA's weights to Llama's."""
    from transformers.core_model_loading import WeightRenaming

    layers = {
        "attn_norm": "input_layernorm",
        "ff_norm": "post_attention_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj",
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    }
    whole = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    return [
        *(WeightRenaming(rf"^model.transformer.{theirs}.", rf"^{ours}.") for theirs, ours in whole.items()),
        *(
            WeightRenaming(rf"^model.transformer.blocks.(\d+).{theirs}.", rf"^model.layers.\1.{ours}.")
            for theirs, ours in layers.items()
        ),
    ]


BAILING_CHAT = (
    "{% if messages[0]['role'] != 'system' %}<role>SYSTEM</role>detailed thinking off<|role_end|>{% endif %}"
    "{% for message in messages %}"
    "<role>{{ 'HUMAN' if message['role'] == 'user' else message['role'] | upper }}</role>"
    "{{ message['content'] }}<|role_end|>"
    "{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
"""Chat format of LLaDA2, the one of the Ling models it was made from (docs/models.md has the sources)."""


# --- Mixtures of experts ---------------------------------------------------------------------------------------------


def from_llada_moe(raw: Raw) -> Raw:
    """Translate LLaDA-MoE's names into Qwen3-MoE's."""
    _require(raw, "LLaDA-MoE", qk_layernorm=True, shared_expert_intermediate_size=None, partial_rotary_factor=1)
    _require(raw, "LLaDA-MoE", moe_router_score_function="softmax", moe_router_enable_expert_bias=False, clip_qkv=None)
    fields = dict(raw)
    fields["moe_intermediate_size"] = fields.pop("expert_intermediate_size")
    fields["intermediate_size"] = fields.pop("dense_intermediate_size", None) or fields["moe_intermediate_size"]
    fields["norm_topk_prob"] = bool(raw.get("norm_topk_prob"))
    fields["decoder_sparse_step"] = 1
    is_moe = fields.pop("moe_layer_freq", None) or []
    fields["mlp_only_layers"] = [layer for layer, moe in enumerate(is_moe) if not moe]
    fields["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    return fields


_LLADA2_SAME = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "attention_dropout",
    "initializer_range",
    "norm_topk_prob",
    "tie_word_embeddings",
]
_LLADA2_FIELDS = dict(zip(_LLADA2_SAME, _LLADA2_SAME, strict=True)) | {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "attention_bias": "use_qkv_bias",
}
_LLADA2_FIXED = {
    "use_bias": False,
    "use_qk_norm": True,
    "score_function": "sigmoid",
    "norm_head": False,
    "moe_router_enable_expert_bias": True,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
}


def from_llada2(raw: Raw) -> Raw:
    """Translate the names of LLaDA2 into those of GLM-4-MoE."""
    _require(raw, "LLaDA2", **_LLADA2_FIXED, use_qkv_bias=False, use_sliding_window=False)
    if raw["num_experts"] % raw.get("n_group", 1):
        raise ValueError(f"config.json: n_group must divide {raw['num_experts']} experts; got {raw['n_group']}.")
    return _pick(raw, _LLADA2_FIELDS) | {"norm_topk_prob": raw.get("norm_topk_prob", True), "use_qk_norm": True}


def to_llada2(config: Raw) -> Raw:
    """Write a GLM-4-MoE config as LLaDA2's."""
    raw = {theirs: config[ours] for ours, theirs in _LLADA2_FIELDS.items() if ours in config}
    rotary_dim = int(config["head_dim"] * config["partial_rotary_factor"])
    raw |= _LLADA2_FIXED | {"use_qkv_bias": False, "use_sliding_window": False}
    return raw | {"rotary_dim": rotary_dim, "router_dtype": "fp32"}  # which its readers assert on


def llada2_weights() -> list[Any]:
    """Split the fused projection of LLaDA2 and rename the rest to GLM-4-MoE's."""
    from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

    return [
        WeightRenaming(r"^model.word_embeddings.", r"^model.embed_tokens."),
        WeightRenaming(r"attention.dense.", r"self_attn.o_proj."),
        WeightRenaming(r"attention.query_layernorm.", r"self_attn.q_norm."),
        WeightRenaming(r"attention.key_layernorm.", r"self_attn.k_norm."),
        WeightRenaming(r"mlp.gate.expert_bias", r"mlp.gate.e_score_correction_bias"),
        WeightConverter(
            source_patterns=["attention.query_key_value.weight"],
            target_patterns=["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
            operations=[Split(dim=0)],
        ),
    ]


# --- Families that keep the stock weight names -----------------------------------------------------------------------


def plain(raw: Raw) -> Raw:
    """Keep every field of the architecture; what belonged to the family's own sampler or kernels goes."""
    fields = {name: value for name, value in raw.items() if name not in _OWN_FIELDS}
    for name in ("rope_scaling", "sliding_window"):  # RND1 writes False for none
        if fields.get(name) is False:
            del fields[name]
    return fields


_OWN_FIELDS = {
    "mask_token_id",
    "block_size",
    "bd_size",
    "attn_implementation",
    "moe_backend",
    "num_diffusion_steps",
    "is_causal",
}


def to_dream(config: Raw) -> Raw:
    """Write a Qwen2 config as Dream's."""
    return {name: value for name, value in config.items() if name not in ("is_causal", "layer_types")}


def diffugpt_weights() -> list[Any]:
    """Put DiffuGPT's embedding and trunk back in their GPT-2 places."""
    from transformers.core_model_loading import WeightRenaming

    return [
        WeightRenaming(r"^embed_tokens.", r"^transformer.wte."),
        WeightRenaming(r"^denoise_model.", r"^transformer."),
    ]
