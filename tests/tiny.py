"""Random models small enough for hundreds of forwards."""

import torch

from redraft.language_model import LanguageModel
from redraft.models.build import build_model
from redraft.models.config import ModelConfig
from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings


class TinyTokenizer:
    """The ids a model is built with, where no text is needed."""

    bos_token_id = None
    eos_token_id = 1
    pad_token_id = 1  # pad == eos, as many models have it
    mask_token_id = 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def tiny_lm(
    *,
    vocab_size=40,
    architecture="llama",
    dtype=torch.float64,
    shift_logits=False,
    seed=0,
    scale=8.0,
    block_size=None,
    within=None,
):
    """Build a random model small enough for hundreds of forwards; `scale` makes its predictions differ clearly.

    With `within` its context is causal.
    """
    torch.manual_seed(seed)
    context = "block" if within is None else "causal"
    settings = DiffusionSettings(
        mask_token_id=2, shift_logits=shift_logits, block_size=block_size, context=context, within=within
    )
    config = ModelConfig(
        size="hidden=32,layers=2,heads=2,intermediate=64", architecture=architecture, max_positions=128
    )
    model = build_model(config, settings, tokenizer=TinyTokenizer(vocab_size)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return LanguageModel(denoiser=Denoiser(model, settings), tokenizer=None, eos_token_ids=(1,))
