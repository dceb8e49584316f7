"""What a run begins with: random weights of a configured shape, or a diffusion model that exists."""

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
    """Load the model to go on from, as float32 master weights; None where a run begins with random ones.

    What stays frozen under an adapter is held in the precision of the run, or quantised. The tokenizer gets
    the mask token of its settings where it knows the id, so that a text can never hold it unseen.

    Raises ValueError where `redraft.load` does (an autoregressive model is to be converted first), where it has no
    tokenizer, another process than the run's, or a shorter context than the run's windows.
    """
    path = config.model.start
    if path is None:
        return None
    if split_adapter(path)[1] is not None:
        raise ValueError(
            f"model.start must hold whole weights; {path} is an adapter. Merge it: redraft convert {path} OUT."
        )
    is_half = config.adapter.rank > 0 and config.train.precision == "bfloat16"  # what is frozen needs no master weights
    dtype = torch.bfloat16 if is_half else torch.float32
    lm = load(path, dtype=dtype, device="cpu", quantization=config.model.quantization)
    settings, tokenizer = lm.denoiser.settings, lm.tokenizer
    if tokenizer is None:
        raise ValueError(f"model.start must bring its tokenizer; {path} holds none. Save one beside the model.")
    process = config.objective.process
    if settings.process != process:
        raise ValueError(f"{path} was made for the {settings.process} process; this run trains the {process} one.")
    if settings.block_size is not None and config.objective.fills_rows:
        raise ValueError(
            f"{path} attends in blocks of {settings.block_size}, which kind {config.objective.kind} does not train. "
            f"Use --objective.kind block --objective.block-size {settings.block_size}, or a start without blocks."
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
    """Build the denoiser to train; its settings, which the checkpoint will carry, say what it is trained for.

    From a start its mask token and logit shift stay, as the weights were made for them, and its block size unless the
    objective brings its own.
    """
    if start is None:
        settings = config.objective.settings(require_mask_token(tokenizer))
        shape = dataclasses.replace(config.model, max_positions=config.model.max_positions or config.data.seq_len)
        return Denoiser(build_model(shape, settings, tokenizer=tokenizer), settings)
    before, objective = start.denoiser.settings, config.objective
    size = before.block_size if objective.block_size is None else objective.block_size
    settings = dataclasses.replace(before, schedule=objective.schedule, block_size=size)
    settings.save_to(start.model.config)
    if config.adapter.rank:
        add_adapter(start.model, config.adapter)
    return Denoiser(start.model, settings)
