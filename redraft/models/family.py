"""Model families: renames of config fields and weights onto a stock transformers class."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redraft.models.files import Raw, reading
from redraft.models.settings import DiffusionSettings

_NOT_THE_MODELS = {
    "model_type", "architectures", "auto_map", "transformers_version", "diffusion", "generation", "mask_token_id",
    "block_size", "bd_size", "attn_implementation", "moe_backend", "num_diffusion_steps", "is_causal",
    "text_mask_token_id", "causal_attn",
}  # fmt: skip
"""Fields of config.json that describe the file, the family's sampler or its kernels."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's checkpoints become a stock transformers model."""

    name: str
    stock: str
    """`model_type` of the transformers architecture."""
    model_types: tuple[str, ...] = ()
    """`model_type` in its config.json; empty where it says nothing (then the class, `hub_ids` or `family=` decide)."""
    architectures: tuple[str, ...] = ()
    """The classes that tell families apart which share a `model_type`, or have that of an autoregressive model."""
    hub_ids: tuple[str, ...] = ()
    """Beginnings of hub ids, lower case, for checkpoints whose config.json looks autoregressive."""
    class_name: str | None = None
    """Class in transformers, if it is not the causal language model of `stock`."""
    process: str = "masked"
    fields: dict[str, str] = field(default_factory=dict)
    """Fields of config.json under other names: stock name -> the family's name."""
    fixed: Raw = field(default_factory=dict)
    """Fields of config.json with the only value that the stock class computes; another value is refused."""
    computed: Callable[[Raw], Raw] = lambda raw: {}
    """config.json -> stock fields that no renaming gives."""
    weights: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Patterns of weight names: the family's -> the stock ones; several are parts of one matrix, cut at dimension 0."""
    mask_token_id: int | None = None
    """If config.json does not say it; None: the tokenizer's mask token."""
    eos_token_id: int | None = None
    block_size: int | None = None
    """If config.json does not say it; None: full attention."""
    published_blocks: Mapping[str, int | None] = field(default_factory=dict)
    """For families whose checkpoints differ and whose config.json may not say it: regular expression of the whole
    published name -> block size. Nothing is guessed for other names."""
    shift_logits: bool = False
    within: str | None = None
    """How an open block attends where the context is causal; None: the context attends in blocks."""
    generation: Raw = field(default_factory=dict)
    """Published settings of its sampler, by the names of `SamplingConfig`, which this layer does not know. Its
    `steps_per_block` are one for each token: a checkpoint with other blocks gets as many as these have tokens."""
    chat_template: str | None = None
    """Jinja, for a tokenizer that has none; only where every checkpoint of the family was trained on it."""
    tokenizer_class: str | None = None
    """Class of transformers that reads a tokenizer whose own class is remote code."""
    original: Callable[[Raw], Raw] | None = None
    """Stock config -> what its code reads beside the renamed fields (`redraft convert --to`); None: not offered."""

    def conversions(self) -> list[Any]:
        """Return transformers' weight transforms, from the family's names to the stock ones."""
        from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

        made: list[Any] = []
        for theirs, ours in self.weights.items():
            if isinstance(ours, str):
                made.append(WeightRenaming(theirs, ours))
            else:
                parts = list(ours)
                made.append(WeightConverter(source_patterns=[theirs], target_patterns=parts, operations=[Split(dim=0)]))
        return made

    def config(
        self, raw: Raw, *, mask_token_id: int | None = None, block_size: int | None = None, path: str | Path = ""
    ) -> Any:
        """Build the stock config, with diffusion settings where a mask token is known.

        `block_size` is the user's, for a family whose checkpoints differ in their blocks.

        Raises ValueError for a variant that the stock class does not compute, and where the blocks of a checkpoint
        cannot be known.
        """
        from transformers import AutoConfig

        with reading(f"config.json as one of {self.name}", passing=ValueError):
            fields = self._stock_fields(raw)
        if fields.get("eos_token_id") is None and (self.eos_token_id or 0) < fields.get("vocab_size", 1):
            fields["eos_token_id"] = self.eos_token_id
        with reading(f"config.json as one of {self.name}"):
            config = AutoConfig.for_model(self.stock, **fields)
        theirs = raw.get("text_mask_token_id", self.mask_token_id)  # SDLM's name for it
        mask = mask_token_id if mask_token_id is not None else raw.get("mask_token_id", theirs)
        saved = raw.get("diffusion")
        published = dict(self.generation)
        if saved or mask is not None:
            causal = {} if self.within is None else {"context": "causal", "within": self.within}
            chosen = block_size if self.published_blocks else None
            saved = saved or causal | {
                "process": self.process,
                "shift_logits": self.shift_logits,
                "block_size": chosen or self._block_size(raw, path),
            }
            if "steps_per_block" in published:
                published["steps_per_block"] = saved.get("block_size")
            DiffusionSettings.from_saved(saved, mask_token_id=mask).save_to(config)
        config.generation = raw.get("generation", published)
        return config

    def _stock_fields(self, raw: Raw) -> Raw:
        for name, value in self.fixed.items():
            if raw.get(name, value) != value:
                raise ValueError(
                    f"config.json: this {self.name} checkpoint has {name}={raw[name]!r}; only {value!r} can be loaded."
                )
        stock_names = {theirs: ours for ours, theirs in self.fields.items()}
        others = self.fixed.keys() | _NOT_THE_MODELS
        fields = {stock_names.get(name, name): value for name, value in raw.items() if name not in others}
        for name in ("rope_scaling", "sliding_window"):  # RND1 writes False for none
            if fields.get(name) is False:
                del fields[name]
        return fields | self.computed(raw)

    def _block_size(self, raw: Raw, path: str | Path) -> Any:
        for name in ("block_size", "bd_size", "canvas_length"):
            if (size := raw.get(name)) is None:
                continue
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
            f'{names[0]!r} tells how many tokens they have. Pass block_size=N to redraft.load, write "block_size": N '
            f"into config.json{full}, or use `redraft convert --block-size N`."
        )

    def original_config(self, config: Any) -> Raw:
        """Write a stock config as the family's config.json. Raises ValueError where its code computes another model."""
        assert self.original is not None
        diffusion = getattr(config, "diffusion", None) or {}
        facts = {
            "the architecture": (config.model_type, self.stock),
            "shift_logits": (diffusion.get("shift_logits", False), self.shift_logits),
            "block-causal attention": (bool(diffusion.get("block_size")), bool(self.block_size)),
            "the context of a block": (diffusion.get("context", "block"), "block"),
        }
        for what, (ours, theirs) in facts.items():  # their code has these built in
            if ours != theirs:
                raise ValueError(f"cannot be written as {self.name}: {what} is {ours!r} here and {theirs!r} there.")
        saved = config.to_dict()
        saved |= saved.pop("rope_parameters", None) or {}  # older code reads rope_theta among the other fields
        raw = {self.fields.get(name, name): value for name, value in saved.items() if value is not None}
        for name in ("is_causal", "layer_types", "rope_type", "_name_or_path", "id2label", "label2id"):
            raw.pop(name, None)
        names: Raw = {"model_type": self.model_types[0], "architectures": list(self.architectures)}
        names |= {"mask_token_id": diffusion.get("mask_token_id"), "diffusion": diffusion}
        return raw | self.fixed | self.original(saved) | names | {"generation": saved.get("generation") or {}}


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
