"""The model that a run starts from: random weights of a configured shape, or an existing diffusion model."""

import dataclasses
from typing import Any

import torch

from redraft.data.tokenizer import require_mask_token
from redraft.language_model import LanguageModel, load
from redraft.models.adapter import split_adapter
from redraft.models.build import build_model
from redraft.models.denoiser import Denoiser
from redraft.training.adapter import add_adapter
from redraft.training.config import RunConfig


def load_start(config: RunConfig) -> LanguageModel | None:
    """Load the model to continue from, as float32 master weights; None for a run from random weights.

    Weights that stay frozen under an adapter are stored in the precision of the run, or quantised. The tokenizer gets
    the model's mask token as a special token if it has the id, so that text is never encoded as a mask.

    Raises ValueError where `redraft.load` does (an autoregressive model must be converted first), and for a model
    without a tokenizer, with another process than the run's, or with a shorter context than the run's windows.
    """
    path = config.model.start
    if path is None:
        return None
    if split_adapter(path)[1] is not None:
        raise ValueError(
            f"model.start must hold whole weights; {path} is an adapter. Merge it: redraft convert {path} OUT."
        )
    is_half = config.adapter.rank > 0 and config.train.precision == "bfloat16"  # frozen weights need no float32 copy
    dtype = torch.bfloat16 if is_half else torch.float32
    lm = load(path, dtype=dtype, device="cpu", quantization=config.model.quantization)
    settings, tokenizer = lm.denoiser.settings, lm.tokenizer
    if tokenizer is None:
        raise ValueError(f"model.start must bring its tokenizer; {path} holds none. Save one beside the model.")
    process = config.objective.process
    if settings.process != process:
        raise ValueError(f"{path} was trained for process {settings.process}; got {process}. Change objective.kind.")
    if settings.block_size is not None and config.objective.fills_rows:
        raise ValueError(
            f"{path} attends in blocks of {settings.block_size}, which kind {config.objective.kind} does not train. "
            f"Use --objective.kind block --objective.block-size {settings.block_size}, or a model without blocks."
        )
    if settings.context == "causal" and config.objective.kind == "block" and config.objective.context == "block":
        raise ValueError(
            f"{path} has a causal context, which objective.context block does not train. Use "
            f"--objective.context causal --objective.within {'causal' if settings.within == 'causal' else 'full'}."
        )
    if lm.context_length is not None and config.data.seq_len > lm.context_length:
        raise ValueError(
            f"data.seq_len must not exceed the context of model.start; got {config.data.seq_len} and "
            f"{lm.context_length}. Use --data.seq-len {lm.context_length} or less."
        )
    is_known = settings.mask_token_id in tokenizer.get_vocab().values()
    if is_known and tokenizer.mask_token_id != settings.mask_token_id:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(settings.mask_token_id)
    return lm


def build_denoiser(config: RunConfig, start: LanguageModel | None, *, tokenizer: Any) -> Denoiser:
    """Build the denoiser to train, with the `diffusion` settings that the checkpoint will have.

    A start model keeps its mask token and logit shift, as its weights were trained for them, and its blocks unless the
    objective sets them.
    """
    if start is None:
        settings = config.objective.settings(require_mask_token(tokenizer))
        shape = dataclasses.replace(config.model, max_positions=config.model.max_positions or config.data.seq_len)
        return Denoiser(build_model(shape, settings, tokenizer=tokenizer), settings)
    before, objective = start.denoiser.settings, config.objective
    settings = dataclasses.replace(before, schedule=objective.schedule)
    if objective.kind == "block":
        made = objective.settings(before.mask_token_id)
        settings = dataclasses.replace(settings, block_size=made.block_size, context=made.context, within=made.within)
    settings.save_to(start.model.config)
    if config.adapter.gate and settings.context != "causal":
        raise ValueError(
            f"adapter.gate needs a causal context, whose text the base keeps; {config.model.start} has none. Convert "
            "an autoregressive model with redraft convert --context causal, and train with --objective.context causal."
        )
    if config.adapter.rank:
        add_adapter(start.model, config.adapter)
    return Denoiser(start.model, settings)
