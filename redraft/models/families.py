"""The model families. A new one is one entry here (docs/models.md lists the sources of every number).

A released diffusion language model is a stock architecture under other names, without the causal mask. The renames run
inside transformers' own loader, tensor by tensor; no code of the checkpoint is ever run.
"""

from redraft.errors import import_own, unknown_name
from redraft.models.family import Family
from redraft.models.files import Raw


def find_family(raw: Raw, *, name: str | None = None, hub_id: str = "") -> Family | None:
    """Find the family of a checkpoint: the one named, or by its config.json or hub id; None if it has none.

    A family of your own is named MODULE:NAME. Raises ValueError for a name that is not a family.
    """
    if name is not None:
        return _named(name)
    classes = set(raw.get("architectures") or ())
    of_type = [family for family in FAMILIES if raw.get("model_type") in family.model_types]
    of_type.sort(key=lambda family: any(raw.get(name, value) != value for name, value in family.fixed.items()))
    of_class = [family for family in of_type if classes & set(family.architectures)]
    by_class = [family for family in FAMILIES if not family.model_types and classes & set(family.architectures)]
    of_hub = [family for family in FAMILIES if hub_id.lower().startswith(family.hub_ids)]
    return next(iter([*of_class, *of_type, *by_class, *of_hub]), None)


def _named(name: str) -> Family:
    if ":" in name:
        family = import_own("family", name)
        if not isinstance(family, Family):
            raise ValueError(f"family {name} must be a redraft.models.family.Family; got {type(family).__name__}.")
        return family
    by_name = {family.name: family for family in FAMILIES}
    if name not in by_name:
        raise unknown_name("family", name, (*by_name, "MODULE:NAME"))
    return by_name[name]


def known_model_types() -> list[str]:
    """List the `model_type`s of all families."""
    return sorted({model_type for family in FAMILIES for model_type in family.model_types})


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
    "tie_word_embeddings": "weight_tying",
}
_LLADA_OFF = ("alibi", "include_bias", "include_qkv_bias", "attention_layer_norm", "input_emb_norm", "scale_logits")
_LLADA_FIXED = {"block_type": "llama", "layer_norm_type": "rms", "rope": True} | dict.fromkeys(_LLADA_OFF, False)
_LLADA_ENDS = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_LLADA_LAYERS = {
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
_LLADA_WEIGHTS = {rf"^model.transformer.{theirs}.": rf"^{ours}." for theirs, ours in _LLADA_ENDS.items()} | {
    rf"^model.transformer.blocks.(\d+).{theirs}.": rf"^model.layers.\1.{ours}."
    for theirs, ours in _LLADA_LAYERS.items()
}


def _of_llada(raw: Raw) -> Raw:
    heads = raw.get("n_kv_heads")
    if heads is None:
        heads = 1 if raw.get("multi_query_attention") else raw["n_heads"]
    return {
        "vocab_size": raw.get("embedding_size") or raw["vocab_size"],
        "intermediate_size": raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"],
        "num_key_value_heads": heads,
    }


def _to_llada(config: Raw) -> Raw:
    more = {"layer_norm_with_affine": True, "bias_for_layer_norm": False, "rope_full_precision": True}
    return more | {"vocab_size": config["vocab_size"], "mlp_ratio": 4, "block_group_size": 1}


# --- Mixtures of experts ---------------------------------------------------------------------------------------------


_LLADA_MOE_FIXED = {
    "qk_layernorm": True,
    "shared_expert_intermediate_size": None,
    "partial_rotary_factor": 1,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "clip_qkv": None,
}


def _of_llada_moe(raw: Raw) -> Raw:
    is_sparse = raw.get("moe_layer_freq") or []
    return {
        "intermediate_size": raw.get("dense_intermediate_size") or raw["expert_intermediate_size"],
        "norm_topk_prob": bool(raw.get("norm_topk_prob")),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, sparse in enumerate(is_sparse) if not sparse],
        "head_dim": raw["hidden_size"] // raw["num_attention_heads"],
    }


_LLADA2_OFF = ("use_bias", "use_qkv_bias", "use_sliding_window", "norm_head")
_LLADA2_FIXED = {
    **dict.fromkeys(_LLADA2_OFF, False),
    "use_qk_norm": True,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
}
_LLADA2_WEIGHTS: dict[str, str | tuple[str, ...]] = {
    r"^model.word_embeddings.": r"^model.embed_tokens.",
    r"attention.dense.": r"self_attn.o_proj.",
    r"attention.query_layernorm.": r"self_attn.q_norm.",
    r"attention.key_layernorm.": r"self_attn.k_norm.",
    r"mlp.gate.expert_bias": r"mlp.gate.e_score_correction_bias",
    "attention.query_key_value.weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
}
_LLADA2_CHAT = (
    "{% if messages[0]['role'] != 'system' %}<role>SYSTEM</role>detailed thinking off<|role_end|>{% endif %}"
    "{% for message in messages %}"
    "<role>{{ 'HUMAN' if message['role'] == 'user' else message['role'] | upper }}</role>"
    "{{ message['content'] }}<|role_end|>"
    "{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
"""Chat format of LLaDA2, the one of the Ling models it was made from."""


def _of_llada2(raw: Raw) -> Raw:
    if raw["num_experts"] % raw.get("n_group", 1):
        raise ValueError(f"config.json: n_group must divide {raw['num_experts']} experts; got {raw['n_group']}.")
    if raw.get("expert_capacity") is not None:
        raise ValueError(
            f"config.json: expert_capacity={raw['expert_capacity']!r} is of LLaDA2.2, which lets each block choose the "
            "experts of its tokens. transformers has no such router: with its own, the logits would be others."
        )
    # `sliding_window` may be set although it is switched off; the masks would use it.
    return {"norm_topk_prob": raw.get("norm_topk_prob", True), "use_qk_norm": True, "sliding_window": None}


def _to_llada2(config: Raw) -> Raw:
    # Its readers assert on both.
    return {"rotary_dim": int(config["head_dim"] * config["partial_rotary_factor"]), "router_dtype": "fp32"}


# --- A causal context ------------------------------------------------------------------------------------------------

_ENCODER = {r"^encoder.": r"^model.", r"^diffusion_head.": r"^lm_head."}


def _of_nemotron(raw: Raw) -> Raw:
    """Name the rotary settings as transformers does; without the scale of queries, its factor is 1."""
    rope = {"rope_theta": raw.get("rope_theta", 1e6), "llama_4_scaling_beta": 0.0}
    rope |= {"original_max_position_embeddings": raw.get("max_position_embeddings", 262144)}
    rope |= raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope.setdefault("rope_type", rope.get("type", "default"))
    return {"rope_parameters": rope, "rope_scaling": None}


# --- Blocks that only the published name tells -----------------------------------------------------------------------

_SDAR = r"SDAR-[\d.]+B(-A3B)?-(Chat|Sci)"
_SDAR_BLOCKS = {_SDAR: 4, r"TraDo-[\d.]+B-(Instruct|Thinking)": 4}
_SDAR_BLOCKS |= {rf"{_SDAR}-b{size}": size for size in (4, 8, 16, 32, 64)}
_A2D_BLOCKS = {
    r"(?!.*(bd3lm|opdlm)).+-diffusion-mdlm-v0\.1": None,
    r"(?!.*(mdlm|opdlm)).+-diffusion-bd3lm-v0\.1": 32,
    r"OPDLM-[\d.]+B": 4,
}

FAMILIES = (
    Family(
        name="llada",
        stock="llama",
        model_types=("llada",),
        architectures=("LLaDAModelLM",),
        fields=_LLADA_FIELDS,
        fixed=_LLADA_FIXED,
        computed=_of_llada,
        weights=_LLADA_WEIGHTS,
        original=_to_llada,
        mask_token_id=126336,
        eos_token_id=126081,
        generation={"preset": "llada", "block_size": 32},
    ),
    Family(
        name="llada-moe",
        stock="qwen3_moe",
        model_types=("lladamoe", "llada"),  # the hub's config.json says llada: its class tells it apart
        architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
        fields={"moe_intermediate_size": "expert_intermediate_size"},
        fixed=_LLADA_MOE_FIXED,
        computed=_of_llada_moe,
        mask_token_id=156895,
        eos_token_id=156892,
        generation={"preset": "llada", "block_size": 32},
    ),
    *(
        Family(
            name=name,
            stock="glm4_moe",
            model_types=(model_type,),
            architectures=("LLaDA2MoeModelLM",),
            fields={"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"},
            fixed=_LLADA2_FIXED,
            computed=_of_llada2,
            weights=_LLADA2_WEIGHTS,
            original=_to_llada2,
            mask_token_id=156895,
            eos_token_id=156892,
            block_size=32,
            generation={"preset": name, "max_new_tokens": 512} | generation,
            chat_template=_LLADA2_CHAT,
            tokenizer_class="PreTrainedTokenizerFast",
        )
        for name, model_type, generation in (
            ("llada2", "llada2_moe", {"steps_per_block": 32}),
            ("llada2.1", "llada21_moe", {}),
        )
    ),
    Family(
        name="dream",  # Dream 7B, Dream-Coder, DiffuCoder
        stock="qwen2",
        model_types=("Dream", "dream"),
        architectures=("DreamModel",),
        original=lambda config: {},
        mask_token_id=151666,
        eos_token_id=151643,
        shift_logits=True,
        tokenizer_class="Qwen2Tokenizer",
        generation={"preset": "dream-entropy", "temperature": 0.2, "top_p": 0.95, "max_new_tokens": 512},
    ),
    *(
        Family(
            name=name,
            stock=stock,
            model_types=(name.replace("-", "_"),),
            mask_token_id=151669,
            eos_token_id=151643,
            published_blocks=_SDAR_BLOCKS,
            generation={"preset": "sdar", "steps_per_block": 4, "temperature": 1.0},
        )
        for name, stock in (("sdar", "qwen3"), ("sdar-moe", "qwen3_moe"))
    ),
    Family(
        name="fast-dllm-v2",
        stock="qwen2",
        model_types=("Fast_dLLM_Qwen",),
        mask_token_id=151665,
        eos_token_id=151645,
        block_size=32,
        shift_logits=True,
        generation={"preset": "fast-dllm-v2", "block_size": 8, "threshold": 0.9},
    ),
    *(
        Family(
            name=name,
            stock=stock,
            model_types=("wedlm",),
            fixed={"qk_norm": stock == "qwen3", "attention_bias": stock == "qwen2"},
            block_size=32,
            within="reordered",
            generation={"preset": "wedlm", "block_size": 16, "entropy_threshold": 0.4},
        )
        for name, stock in (("wedlm-7b", "qwen2"), ("wedlm", "qwen3"))
    ),
    Family(
        name="nemotron",
        stock="ministral3",
        model_types=("nemotron_labs_diffusion",),
        architectures=("NemotronLabsDiffusionModel",),
        fixed={"attention_bias": False, "mlp_bias": False},
        computed=_of_nemotron,
        weights=_ENCODER,
        mask_token_id=100,
        block_size=32,
        within="full",
        generation={"preset": "nemotron", "block_size": 32, "threshold": 0.9},
    ),
    Family(
        name="i-dlm",
        stock="qwen3",
        hub_ids=("yifanyu/i-dlm-",),
        mask_token_id=151669,
        block_size=4,
        shift_logits=True,
        within="causal",
        generation={"preset": "ar"},
    ),
    Family(
        name="efficient-dlm",
        stock="qwen3",
        architectures=("EfficientDLM",),
        hub_ids=("nvidia/efficient-dlm-",),
        weights=_ENCODER,
        mask_token_id=151662,
        block_size=32,
        generation={"preset": "fast-dllm"},
    ),
    Family(
        name="stable-diffcoder",
        stock="llama",
        hub_ids=("bytedance-seed/stable-diffcoder-",),
        block_size=4,
        generation={"preset": "bd3lm", "block_size": 4},
    ),
    Family(
        name="sdlm",
        stock="qwen2",
        architectures=("SDLMQwen2ForCausalLM",),
        hub_ids=("opengvlab/sdlm",),
        mask_token_id=151665,
        eos_token_id=151645,
        block_size=4,
        shift_logits=True,
        within="with-last",
        generation={"preset": "sdlm", "threshold": 0.98},
    ),
    Family(
        name="rnd1",
        stock="qwen3_moe",
        model_types=("rnd1",),
        mask_token_id=151669,
        eos_token_id=151645,
        shift_logits=True,
        generation={"preset": "dream-entropy", "temperature": 0.1, "max_new_tokens": 256},
    ),
    *(
        Family(name=f"a2d-{stock}", stock=stock, model_types=(f"a2d-{stock}",), published_blocks=_A2D_BLOCKS)
        for stock in ("gpt2", "llama", "qwen2", "qwen3")
    ),
    Family(
        name="diffusion-gemma",
        stock="diffusion_gemma",
        class_name="DiffusionGemmaForBlockDiffusion",
        model_types=("diffusion_gemma",),
        process="uniform",
        mask_token_id=0,  # its padding: uniform noise has no token of its own, and the canvas is noised before use
        block_size=256,
        generation={"preset": "diffusion-gemma", "max_new_tokens": 256},
    ),
    *(
        Family(
            name=name,
            stock=stock,
            hub_ids=(f"diffusionfamily/{name}",),
            weights=weights,
            shift_logits=True,
            generation={"preset": "llada-random", "temperature": 0.9, "top_p": 0.9, "steps": 64},
        )
        for name, stock, weights in (
            ("diffullama", "llama", {}),
            ("diffugpt", "gpt2", {r"^embed_tokens.": r"^transformer.wte.", r"^denoise_model.": r"^transformer."}),
        )
    ),
    Family(
        name="open-dcoder",
        stock="qwen2",
        hub_ids=("fredzzp/open-dcoder",),
        shift_logits=True,
        generation={"preset": "p2"},
    ),
)
