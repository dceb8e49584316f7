"""`model.generate(..., custom_generate=redraft.custom_generate)`: our loop behind transformers' own call."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from redraft.language_model import LanguageModel
from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings

UNDERSTOOD = ("MaxLengthCriteria", "EosTokenCriteria")


def custom_generate(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    *,
    generation_config: Any,
    logits_processor: Any = (),
    stopping_criteria: Any = (),
    streamer: Any = None,
    preset: str = "llada",
    steps: int | None = None,
    block_size: int | None = None,
    threshold: float | None = None,
    cfg_scale: float = 0.0,
    seed: int = 0,
    **inputs: Any,
) -> Int[Tensor, "batch total"]:
    """Generate as `LanguageModel.generate` does; return prompts and new tokens, padded on the right.

    Length, sampling and logits processors come from transformers' generation config. Raises ValueError for stopping
    criteria that do not carry over: they are made for text that grows from left to right.
    """
    for criterion in stopping_criteria:
        if type(criterion).__name__ not in UNDERSTOOD:
            raise ValueError(f"{type(criterion).__name__} does not carry over to diffusion; use lm.generate(stop=...).")
    eos = generation_config.eos_token_id
    listed = [] if eos is None else eos if isinstance(eos, list) else [eos]
    lm = LanguageModel(
        denoiser=Denoiser(model, DiffusionSettings.read_from(model.config)),
        eos_token_ids=tuple(listed),
    )
    attention_mask = inputs.get("attention_mask")
    is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    out = lm.generate(
        [row[real.bool()] for row, real in zip(input_ids, is_token, strict=True)],
        logits_processor=tuple(logits_processor),  # they hold the temperature and the cuts
        streamer=None if streamer is None else _PromptSeen(streamer),
        preset=preset,
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        steps=steps,
        block_size=block_size,
        threshold=threshold,
        cfg_scale=cfg_scale,
        temperature=1.0 if generation_config.do_sample else 0.0,
        seed=seed,
    )
    padding = generation_config.pad_token_id
    new = pad_sequence(out.tokens, batch_first=True, padding_value=0 if padding is None else padding)
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)


class _PromptSeen:
    """A streamer that has had its prompt: transformers puts it before it calls us."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.is_first = inner, True
        if hasattr(inner, "put_draft"):
            self.put_draft = inner.put_draft

    def put(self, tokens: Tensor) -> None:
        """Pass on all but the prompt."""
        if not self.is_first:
            self.inner.put(tokens)
        self.is_first = False

    def end(self) -> None:
        """Pass on the end."""
        self.inner.end()
