"""`model.generate(..., custom_generate=redraft.custom_generate)`: our loop behind transformers' own call."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from redraft.language_model import LanguageModel
from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings

_CARRIED_OVER = ("MaxLengthCriteria", "EosTokenCriteria")
_LEFT_TO_RIGHT = {
    "num_beams": 1,
    "prompt_lookup_num_tokens": None,
    "penalty_alpha": None,
    "return_dict_in_generate": False,
}
"""Settings of transformers that our loop cannot honour, and the values that leave them off."""


def custom_generate(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    *,
    generation_config: Any,
    logits_processor: Any = (),
    stopping_criteria: Any = (),
    preset: str | None = None,
    steps: int | None = None,
    block_size: int | None = None,
    threshold: float | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    **inputs: Any,
) -> Int[Tensor, "batch total"]:
    """Generate as `LanguageModel.generate` does; return prompts and new tokens, padded on the right.

    Settings that are not given are the checkpoint's own. Length, end tokens, sampling and logits processors come from
    transformers' generation config. Its `do_sample=False` is also its default, so the checkpoint's temperature is used
    then. Raises ValueError for options that need text to grow from left to right: beams, minimum lengths, other
    stopping criteria.
    """
    _check(generation_config, stopping_criteria, inputs)
    ends = generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    denoiser = Denoiser(model, DiffusionSettings.read_from(model.config))
    lm = LanguageModel(denoiser=denoiser, eos_token_ids=tuple(listed))
    attention_mask = inputs.get("attention_mask")
    is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    chosen: dict[str, Any] = {"preset": preset, "steps": steps, "block_size": block_size}
    chosen |= {"threshold": threshold, "cfg_scale": cfg_scale}
    given = {name: value for name, value in chosen.items() if value is not None}
    if generation_config.do_sample:
        given["temperature"] = 1.0  # transformers' processors apply the temperature, top_k and top_p
    out = lm.generate(
        [row[real.bool()] for row, real in zip(input_ids, is_token, strict=True)],
        logits_processor=[_without_padding(processor) for processor in logits_processor],
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        seed=seed,
        **given,
    )
    padding = generation_config.pad_token_id
    new = pad_sequence(out.tokens, batch_first=True, padding_value=0 if padding is None else padding)
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)


def _check(generation_config: Any, stopping_criteria: Any, inputs: dict[str, Any]) -> None:
    for criterion in stopping_criteria:
        if type(criterion).__name__ not in _CARRIED_OVER:
            raise ValueError(f"{type(criterion).__name__} does not carry over to diffusion; use lm.generate(stop=...).")
    for name, off in _LEFT_TO_RIGHT.items():
        value = getattr(generation_config, name, None)
        if value not in (None, off):
            raise ValueError(f"{name} does not carry over to diffusion; got {value}. Leave it out.")
    if inputs.get("streamer") is not None:
        raise ValueError("a streamer does not carry over to diffusion; use lm.generate(streamer=...).")
    if inputs.get("inputs_embeds") is not None:
        raise ValueError("a diffusion canvas is made of token ids; got inputs_embeds. Give input_ids.")


def _without_padding(processor: Any) -> Any:
    """Rebuild transformers' repetition penalty so that it counts the whole prompt: our rows have no left padding."""
    is_penalty = type(processor).__name__ == "RepetitionPenaltyLogitsProcessor"
    return type(processor)(processor.penalty) if is_penalty else processor
