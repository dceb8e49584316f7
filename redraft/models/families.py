"""Model families: a config translation and a table of weight renames onto a stock transformers class.

A released diffusion language model is a stock architecture under other names, without the causal mask. The renames run
inside transformers' own loader, tensor by tensor; no code of the checkpoint is ever run. docs/models.md lists the
families with the sources of every number.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redraft.errors import unknown_name
from redraft.models import translations
from redraft.models.files import reading
from redraft.models.settings import DiffusionSettings
from redraft.models.translations import Raw


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's checkpoints become a stock transformers model."""

    name: str
    stock: str
    """`model_type` of the transformers architecture."""
    model_types: tuple[str, ...] = ()
    """What its config.json calls itself; empty where that says nothing (then `hub_ids` or `family=` decide)."""
    architectures: tuple[str, ...] = ()
    """Where families share a `model_type`: the classes that tell them apart."""
    hub_ids: tuple[str, ...] = ()
    """Beginnings of hub ids, lower case, for checkpoints whose config.json looks autoregressive."""
    class_name: str | None = None
    """Its class, where that is not the causal language model of `stock`."""
    process: str = "masked"
    translate: Callable[[Raw], Raw] = dict
    """config.json -> fields of the stock config."""
    conversions: Callable[[], list[Any]] = list
    """Weight transforms of transformers, from the family's names to the stock ones."""
    mask_token_id: int | None = None
    """Where config.json does not say; None: the tokenizer's mask token."""
    eos_token_id: int | None = None
    block_size: int | None = None
    """Where config.json does not say; None: full attention."""
    published_blocks: dict[str, int | None] = field(default_factory=dict)
    """Where checkpoints differ and config.json may not say: regular expressions of whole published names, and their
    blocks. Nothing is guessed for other names."""
    shift_logits: bool = False
    generation: dict[str, Any] = field(default_factory=dict)
    """Published settings of its sampler, by the names of `SamplingConfig`, which this layer does not know."""
    chat_template: str | None = None
    """Jinja, for a tokenizer that has none; only where every checkpoint of the family was trained on it."""
    tokenizer_class: str | None = None
    """Class of transformers that reads a tokenizer whose own class is remote code."""
    original: Callable[[Raw], Raw] | None = None
    """Stock config -> the family's config.json (`redraft convert --to`); None where that is not offered."""

    def config(
        self, raw: Raw, *, mask_token_id: int | None = None, block_size: int | None = None, path: str | Path = ""
    ) -> Any:
        """Build the stock transformers config, bidirectional and with its diffusion settings where a mask is known."""
        from transformers import AutoConfig

        with reading(f"config.json as one of {self.name}", passing=ValueError):
            fields = self.translate(raw)
        fields |= {name: raw[name] for name in _CARRIED if raw.get(name) is not None}
        if fields.get("eos_token_id") is None and (self.eos_token_id or 0) < fields.get("vocab_size", 1):
            fields["eos_token_id"] = self.eos_token_id
        with reading(f"config.json as one of {self.name}"):
            config = AutoConfig.for_model(self.stock, **{k: v for k, v in fields.items() if k not in _OF_THE_FILE})
        config.generation = raw.get("generation", dict(self.generation))
        mask = mask_token_id if mask_token_id is not None else raw.get("mask_token_id", self.mask_token_id)
        if saved := raw.get("diffusion"):
            DiffusionSettings.from_saved(saved, mask_token_id=mask).save_to(config)
        elif mask is not None:
            self.settings(raw, mask_token_id=mask, block_size=block_size, path=path).save_to(config)
        return config

    def settings(
        self, raw: Raw, *, mask_token_id: int, block_size: int | None = None, path: str | Path = ""
    ) -> DiffusionSettings:
        """Read what the family's config.json says about its diffusion; the family's defaults fill the gaps.

        `block_size` is what the user says. Raises ValueError where the blocks of a checkpoint cannot be known.
        """
        saved = {
            "process": self.process,
            "shift_logits": self.shift_logits,
            "block_size": block_size or self._block_size(raw, path),
        }
        return DiffusionSettings.from_saved(saved, mask_token_id=mask_token_id)

    def _block_size(self, raw: Raw, path: str | Path) -> Any:
        saved = {name: raw[name] for name in ("block_size", "bd_size", "canvas_length") if raw.get(name) is not None}
        for name, size in saved.items():
            if self.block_size is None and not self.published_blocks:
                raise ValueError(
                    f"config.json: this checkpoint has {name}={size!r}, and {self.name} attends to everything: it is "
                    "another model than those of this family."
                )
            return size
        may_be_full = None in self.published_blocks.values()
        if not self.published_blocks or (may_be_full and "block_size" in raw):
            return self.block_size
        names = published_names(path)
        blocks = self.published_blocks.items()
        sizes = {size for name in names for pattern, size in blocks if re.fullmatch(pattern, name, re.IGNORECASE)}
        if len(sizes) == 1:
            return sizes.pop()
        full = " (null for full attention)" if may_be_full else ""
        raise ValueError(
            f"checkpoints of {self.name} differ in their blocks, and neither config.json (block_size) nor the name "
            f'{names[0]!r} tells how many tokens they have. Write "block_size": N into config.json{full}, or use '
            "`redraft convert --block-size N`."
        )

    def original_config(self, config: Any) -> Raw:
        """Write a stock config as the family's config.json. Raises ValueError for a family without a way back."""
        if self.original is None:
            names = [family.name for family in FAMILIES if family.original is not None]
            raise ValueError(f"a checkpoint cannot be written as {self.name}; can be: {', '.join(names)}.")
        diffusion = getattr(config, "diffusion", None) or {}
        facts = {
            "the architecture": (config.model_type, self.stock),
            "shift_logits": (diffusion.get("shift_logits", False), self.shift_logits),
            "block-causal attention": (bool(diffusion.get("block_size")), bool(self.block_size)),
        }
        for what, (ours, theirs) in facts.items():  # their code has these built in
            if ours != theirs:
                raise ValueError(f"cannot be written as {self.name}: {what} is {ours!r} here and {theirs!r} there.")
        saved = translations.flat(config.to_dict())
        raw = self.original(saved)
        raw |= {name: saved[name] for name in _CARRIED if saved.get(name) is not None}
        raw |= {"model_type": self.model_types[0], "architectures": list(self.architectures)}
        generation = getattr(config, "generation", None) or {}
        own = {"mask_token_id": diffusion.get("mask_token_id"), "diffusion": diffusion, "generation": generation}
        return raw | own


def published_names(path: str | Path) -> list[str]:
    """List what a checkpoint may have been published as: its folder or hub id, as given and behind links.

    A folder of the hub's cache has the repository's name (models--OWNER--NAME/snapshots/COMMIT). `_name_or_path` in
    config.json is no such name: a fine-tuned model keeps the name of its base there, whatever its own blocks are.
    """
    names = []
    for folder in (Path(path).absolute(), Path(path).resolve()):
        is_cached = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
        names.append(folder.parents[1].name.split("--")[-1] if is_cached else folder.name)
    return names


def find_family(raw: Raw, *, name: str | None = None, hub_id: str = "") -> Family | None:
    """Find the family of a checkpoint: the one named, or the one its config.json or hub id tells; None if it has none.

    Raises ValueError for a name that is not a family.
    """
    if name is not None:
        for family in FAMILIES:
            if family.name == name:
                return family
        raise unknown_name("family", name, [family.name for family in FAMILIES])
    architectures = set(raw.get("architectures") or ())
    named = [family for family in FAMILIES if raw.get("model_type") in family.model_types]
    for family in named:
        if architectures & set(family.architectures):
            return family
    if named:
        return named[0]
    for family in FAMILIES:
        if hub_id and any(hub_id.lower().startswith(prefix) for prefix in family.hub_ids):
            return family
    return None


def known_model_types() -> list[str]:
    """List the `model_type`s that families answer to."""
    return sorted({model_type for family in FAMILIES for model_type in family.model_types})


_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
_OF_THE_FILE = ("model_type", "architectures", "auto_map", "transformers_version", "diffusion", "generation")
_SDAR = r"SDAR-[\d.]+B(-A3B)?-(Chat|Sci)"
_SDAR_BLOCKS: dict[str, int | None] = {_SDAR: 4}
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
        translate=translations.from_llada,
        conversions=translations.llada_weights,
        original=translations.to_llada,
        mask_token_id=126336,
        eos_token_id=126081,
        generation={"preset": "llada", "block_size": 32},
    ),
    Family(
        name="llada-moe",
        stock="qwen3_moe",
        model_types=("lladamoe", "llada"),  # the hub's config.json says llada: its class tells it apart
        architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
        translate=translations.from_llada_moe,
        mask_token_id=156895,
        eos_token_id=156892,
        generation={"preset": "llada", "block_size": 32},
    ),
    Family(
        name="llada2",
        stock="glm4_moe",
        model_types=("llada2_moe",),
        architectures=("LLaDA2MoeModelLM",),
        translate=translations.from_llada2,
        conversions=translations.llada2_weights,
        original=translations.to_llada2,
        mask_token_id=156895,
        eos_token_id=156892,
        block_size=32,
        generation={"preset": "llada2", "steps_per_block": 32, "max_new_tokens": 512},
        chat_template=translations.BAILING_CHAT,
        tokenizer_class="PreTrainedTokenizerFast",
    ),
    Family(
        name="llada2.1",
        stock="glm4_moe",
        model_types=("llada21_moe",),
        architectures=("LLaDA2MoeModelLM",),
        translate=translations.from_llada2,
        conversions=translations.llada2_weights,
        original=translations.to_llada2,
        mask_token_id=156895,
        eos_token_id=156892,
        block_size=32,
        generation={"preset": "llada2.1", "max_new_tokens": 512},
        chat_template=translations.BAILING_CHAT,
        tokenizer_class="PreTrainedTokenizerFast",
    ),
    Family(
        name="dream",  # Dream 7B, Dream-Coder, DiffuCoder
        stock="qwen2",
        model_types=("Dream", "dream"),
        architectures=("DreamModel",),
        translate=translations.plain,
        original=translations.to_dream,
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
            translate=translations.plain,
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
        translate=translations.plain,
        mask_token_id=151665,
        eos_token_id=151645,
        block_size=32,
        shift_logits=True,
        generation={"preset": "fast-dllm", "block_size": 32, "threshold": 0.9},
    ),
    Family(
        name="rnd1",
        stock="qwen3_moe",
        model_types=("rnd1",),
        translate=translations.plain,
        mask_token_id=151669,
        eos_token_id=151645,
        shift_logits=True,
        generation={"preset": "dream-entropy", "temperature": 0.1, "max_new_tokens": 256},
    ),
    *(
        Family(
            name=f"a2d-{stock}",
            stock=stock,
            model_types=(f"a2d-{stock}",),
            translate=translations.plain,
            published_blocks=_A2D_BLOCKS,
        )
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
    Family(
        name="diffullama",
        stock="llama",
        hub_ids=("diffusionfamily/diffullama",),
        translate=translations.plain,
        shift_logits=True,
        generation={"preset": "llada-random", "temperature": 0.9, "top_p": 0.9, "steps": 64},
    ),
    Family(
        name="diffugpt",
        stock="gpt2",
        hub_ids=("diffusionfamily/diffugpt",),
        translate=translations.plain,
        conversions=translations.diffugpt_weights,
        shift_logits=True,
        generation={"preset": "llada-random", "temperature": 0.9, "top_p": 0.9, "steps": 64},
    ),
    Family(
        name="open-dcoder",
        stock="qwen2",
        hub_ids=("fredzzp/open-dcoder",),
        translate=translations.plain,
        shift_logits=True,
        generation={"preset": "p2"},
    ),
)
