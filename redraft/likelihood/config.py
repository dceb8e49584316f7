"""The settings of training objectives and likelihood estimates. This module imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from redraft.errors import import_own, unknown_name
from redraft.processes import PROCESSES, process_class
from redraft.settings import Count, NonNegative, Positive, Seed, Settings, Within

if TYPE_CHECKING:
    from redraft.likelihood.problem import Objective
    from redraft.models.settings import DiffusionSettings

SMALLEST_T = 1e-3
"""Likelihood bounds are taken over t in (SMALLEST_T, 1]: a thousandth of the noise levels is left out."""

PROCESS_OF_KIND = {name: name for name in PROCESSES if name != "autoregressive"}
PROCESS_OF_KIND |= {"block": "masked", "ar": "autoregressive"}


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(Settings):
    """How likelihoods are estimated."""

    section: ClassVar[str] = "likelihood"

    num_samples: Annotated[int, Within("[4, inf)")] = 128
    """Monte-Carlo samples per continuation (for a block-causal model: per block)."""
    cfg_scale: NonNegative = 0.0
    """LLaDA's guidance: uncond + (scale + 1) (cond - uncond), uncond without the context; twice the work; 0: off."""
    seed: Seed = 0
    """Seed of the masks."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Settings):
    """What is minimised: the noising process, its layout and its weights."""

    section: ClassVar[str] = "objective"
    removed: ClassVar = {
        "weighting": ("bound", "objective.cart P weighs by CART"),
        "cart_p": (0.1, "objective.cart"),
    }

    kind: str = "masked"
    """masked (MDLM, LLaDA), uniform (UDLM, Duo), block (BD3LM), ar (autoregressive), or your own as MODULE:CLASS."""
    block_size: Count | None = None
    """Tokens in a block; kind block needs it."""
    context: Literal["block", "causal"] = "block"
    """How the clean text before a block attends: in blocks, or causally; then the likelihood is exact, and preset ar
    decodes token by token. Kind block."""
    within: Literal["full", "causal"] = "full"
    """How a noised block attends after a causal context."""
    smallest_block: Count | None = None
    """Train for several block sizes: each step draws one among this, its doubles, and block_size. Kind block."""
    grow_steps: Count | None = None
    """Double the blocks from smallest_block to block_size within so many steps instead of drawing their sizes."""
    ar_weight: NonNegative = 0.0
    """Add the autoregressive loss of the clean copy, times this, in the same forward (I-DLM: 0.2; Nemotron: 1 / 0.3).
    Needs a causal context."""
    distill: bool = False
    """Learn the model's own distribution of each token, as the clean copy predicts it, in place of the token of the
    text: forward KL. Needs a causal context; for drafts that the same model checks (preset speculate)."""
    plain: bool = False
    """Weigh all noised tokens alike instead of by the bound's weights. Kinds masked and block."""
    complementary: bool = False
    """Train on each row twice, under a mask and under its complement: twice the work, less variance. Kinds masked and
    block."""
    cart: Annotated[float, Within("(0, 1]")] | None = None
    """Weigh a noised token by the clean tokens near it instead of the bound's weight (Dream's CART). The smaller this
    is, the farther a clean token counts. Kind masked."""
    schedule: Literal["linear", "log-linear", "cosine", "polynomial", "geometric"] = "linear"
    """Noise schedule; polynomial has power 2."""
    t_min: float = SMALLEST_T
    """Smallest time drawn in training. A larger one avoids rows with few masked tokens and large weights; 1 masks every
    token (TiDAR, arXiv 2511.08923)."""
    t_max: float = 1.0
    """Largest time drawn in training. (Clipped noise: arXiv 2503.09573. Evaluation always covers (0.001, 1].)"""
    exclude_mask: bool = True
    """Give the mask token probability 0 in the softmax (MDLM); LLaDA does not."""
    beta: Positive = 0.1
    """DPO's beta: the larger, the closer the model stays to model.start (data.kind preference)."""
    num_samples: Count = 8
    """Draws of time and mask per answer of a pair; memory grows with it (data.kind preference)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.t_min <= self.t_max <= 1 or not self.t_max:
            raise ValueError(
                "objective.t_min and t_max must satisfy 0 <= t_min <= t_max <= 1 and 0 < t_max; got "
                f"{self.t_min}, {self.t_max}."
            )
        if ":" in self.kind:
            _find_class(self.kind)
        elif self.kind not in PROCESS_OF_KIND:
            raise unknown_name("objective.kind", self.kind, (*PROCESS_OF_KIND, "MODULE:CLASS"))
        else:
            self._check_kind()

    def _check_kind(self) -> None:
        """Raise ValueError for settings that this kind of objective does not have."""
        if (self.kind == "block") != (self.block_size is not None):
            advice = "Set it, e.g. to 16." if self.kind == "block" else "Use --objective.kind block, or leave it out."
            raise ValueError(f"objective.block_size goes with kind block; got {self.block_size}, {self.kind}. {advice}")
        if self.context == "causal" and self.kind != "block":
            raise ValueError(
                f"objective.context causal is for kind block; got kind {self.kind}. Use --objective.kind block."
            )
        if self.within == "causal" and self.context != "causal":
            raise ValueError(
                "objective.within causal needs a causal context; got context block. Use --objective.context causal."
            )
        if self.smallest_block is not None and self.smallest_block > (self.block_size or 0):
            raise ValueError(
                "objective.smallest_block must be at most block_size, of kind block; got "
                f"{self.smallest_block}, {self.block_size}."
            )
        if self.grow_steps is not None and self.smallest_block is None:
            raise ValueError("objective.grow_steps needs a smallest_block to grow from; got none. Set it, e.g. to 1.")
        if self.ar_weight and self.context != "causal":
            raise ValueError(
                f"objective.ar_weight needs a causal context; got {self.context}. Use --objective.context causal."
            )
        if self.distill and (self.context != "causal" or self.ar_weight or self.complementary or self.plain):
            raise ValueError(
                "objective.distill needs a causal context, without ar_weight, complementary and plain; got context "
                f"{self.context}, ar_weight {self.ar_weight:g}, complementary {self.complementary}, plain {self.plain}."
            )
        if self.plain and (self.kind not in ("masked", "block") or self.cart is not None):
            raise ValueError(
                f"objective.plain is for kinds masked and block, without cart; got {self.kind}, cart {self.cart}. "
                "Leave it out."
            )
        if self.complementary and (self.kind not in ("masked", "block") or self.schedule != "linear"):
            raise ValueError(
                f"objective.complementary needs masked noise (kind masked or block) and the linear schedule; "
                f"got {self.kind}, {self.schedule}."
            )
        is_even = self.t_min + self.t_max == 1 or (self.t_min <= SMALLEST_T and self.t_max == 1)
        if self.complementary and not is_even:
            raise ValueError(
                "objective.complementary noises at t and at 1 - t, so t_min and t_max must be symmetric about 0.5; got "
                f"{self.t_min}, {self.t_max}. Use t_max = 1 - t_min."
            )
        if self.cart is not None and self.kind != "masked":
            raise ValueError(f"objective.cart is for kind masked; got kind {self.kind}. Leave cart out.")

    @property
    def process(self) -> str:
        """Name of the noising process; an objective of your own trains a masked model."""
        return PROCESS_OF_KIND.get(self.kind, "masked")

    @property
    def fills_rows(self) -> bool:
        """Whether all of a row is denoised together, so that its length is known beforehand."""
        return self.kind in PROCESSES

    @property
    def measure(self) -> str:
        """What an evaluation reports: a bound on the negative log-likelihood, or the likelihood itself."""
        return "NLL" if self.kind == "ar" else "NELBO"

    def build(self, *, mask_token_id: int, vocab_size: int) -> "Objective":
        """Build the objective for a model's vocabulary. Your own class is called with the same and `config=self`."""
        from redraft.likelihood.objectives.autoregressive import Autoregressive
        from redraft.likelihood.objectives.diffusion import Diffusion
        from redraft.schedules import schedule_from_name

        if ":" in self.kind:
            custom: Objective = _find_class(self.kind)(config=self, mask_token_id=mask_token_id, vocab_size=vocab_size)
            return custom
        if self.kind == "ar":
            return Autoregressive(mask_token_id=mask_token_id)
        process = process_class(self.process).build(
            mask_token_id=mask_token_id,
            vocab_size=vocab_size,
            schedule=schedule_from_name(self.schedule),
            exclude_mask=self.exclude_mask,
        )
        return Diffusion(
            process=process,
            block_size=self.block_size,
            context=self.context,
            within=self.within,
            smallest_block=self.smallest_block,
            grow_steps=self.grow_steps,
            ar_weight=self.ar_weight,
            is_distilled=self.distill,
            is_plain=self.plain,
            t_min=self.t_min,
            t_max=self.t_max,
            is_complementary=self.complementary,
            cart=self.cart,
        )

    def settings(self, mask_token_id: int) -> "DiffusionSettings":
        """Return the `diffusion` settings of the checkpoint that this objective trains."""
        from redraft.models.settings import DiffusionSettings

        is_ar = self.kind == "ar"
        return DiffusionSettings(
            mask_token_id=mask_token_id,
            process=self.process,
            schedule=self.schedule,
            shift_logits=is_ar,
            block_size=1 if is_ar else self.block_size,
            context=self.context,
            within=self.within if self.context == "causal" else None,
        )


def _find_class(name: str) -> Any:
    """Import MODULE:CLASS. Raises ValueError where it cannot be imported, or is no objective."""
    objective = import_own("objective.kind", name)
    if missing := [method for method in ("problem", "evaluation") if not hasattr(objective, method)]:
        raise ValueError(f"objective.kind {name} is not an objective: it has no {' and no '.join(missing)}.")
    return objective
