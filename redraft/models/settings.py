"""What a checkpoint says about its own diffusion: the `diffusion` entry of config.json. No torch."""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from redraft.settings import Count, Settings

if TYPE_CHECKING:
    from redraft.layouts import Layout


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings(Settings):
    """What a denoiser and a sampler must know about a model; saved with it, so that no command needs flags for it."""

    section: ClassVar[str] = "config.json: diffusion"

    mask_token_id: int
    process: str = "masked"
    """Name of the noising process, from the table in `redraft/processes/__init__.py`."""
    schedule: str = "linear"
    shift_logits: bool = False
    """Position i is predicted by the logits of position i - 1, as an autoregressive model was trained to."""
    block_size: Count | None = None
    """Tokens in a block of block-causal attention; absent for full attention."""
    context: Literal["block", "causal"] = "block"
    """How committed text attends: in blocks, or causally; then each of its tokens predicts the next one."""
    within: Literal["full", "causal", "reordered", "with-last"] | None = None
    """How an open block attends after a causal context; absent without one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context == "causal" and self.within is None:
            raise ValueError(
                "config.json: diffusion.context is causal, and diffusion.within does not say how a block attends; "
                'got None. Write "within": "full" (as Nemotron-Labs-Diffusion), "causal" (as I-DLM), "reordered" (as '
                'WeDLM) or "with-last" (as SDLM) into it.'
            )
        if self.context == "causal" and self.block_size is None:
            raise ValueError(
                "config.json: diffusion.context is causal, and diffusion.block_size is absent. Write the tokens of an "
                "open block into it."
            )
        if self.context == "block" and self.within is not None:
            raise ValueError(
                f"config.json: diffusion.within is for context causal; got within {self.within!r} and context 'block'. "
                "Leave within out."
            )

    @property
    def is_autoregressive(self) -> bool:
        """A causal model (blocks of one token, shifted logits): plain transformers computes it as it stands."""
        return self.process == "autoregressive"

    @property
    def is_causal(self) -> bool:
        """Whether committed tokens predict the next one, as plain transformers computes it: autoregressive, or more."""
        return self.is_autoregressive or self.context == "causal"

    @property
    def layout(self) -> "Layout":
        """The attention the model was trained with."""
        from redraft.layouts import Layout  # torch

        return Layout(block_size=self.block_size, context=self.context, within=self.within or "full")

    def saved(self) -> dict[str, Any]:
        """Return the `diffusion` entry of a config.json; without a causal context it does not speak of one."""
        names = {"context", "within"} if self.context == "block" else ()
        return {name: value for name, value in asdict(self).items() if name not in names}

    def save_to(self, config: Any) -> None:
        """Write the settings into a transformers config, and make it bidirectional unless its text is causal."""
        config.diffusion = self.saved()
        if config.get_text_config() is config:  # DiffusionGemma's two stacks say it themselves
            config.is_causal = self.is_causal

    @classmethod
    def from_saved(cls, saved: dict[str, Any], **overrides: Any) -> "DiffusionSettings":
        """Build the settings from the `diffusion` entry of a config.json; overrides that are not None win.

        Raises ValueError for entries that are unknown or of another type, and where nothing says the mask token.
        """
        known = {field.name for field in fields(cls)}
        if unknown := set(saved) - known:
            raise ValueError(
                f"config.json: diffusion has unknown entries {sorted(unknown)}; known are {sorted(known)}."
            )
        chosen = {**saved, **{name: value for name, value in overrides.items() if value is not None}}
        if chosen.get("mask_token_id") is None:
            raise ValueError(
                "this model names no mask token (config.json has no diffusion.mask_token_id). Pass mask_token_id=."
            )
        return cls(**chosen)

    @classmethod
    def read_from(cls, config: Any, **overrides: Any) -> "DiffusionSettings":
        """Read the settings of a transformers config; overrides that are not None win.

        Raises ValueError as `from_saved` does, and where the mask token lies outside the vocabulary.
        """
        settings = cls.from_saved(getattr(config, "diffusion", None) or {}, **overrides)
        vocab_size = config.get_text_config().vocab_size
        if not 0 <= settings.mask_token_id < vocab_size:
            raise ValueError(
                f"mask_token_id must lie in the vocabulary of {vocab_size} tokens; got {settings.mask_token_id}."
            )
        return settings
