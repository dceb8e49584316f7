"""Folders of latent models: config.json has the stage, `autoencoder/` the autoencoder of a denoiser."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from redraft.checkpoints import local_path
from redraft.latent.autoencoder import AutoencoderConfig, TextAutoencoder
from redraft.latent.config import AUTOENCODER_FOLDER
from redraft.latent.denoiser import LatentDenoiser, LatentDenoiserConfig
from redraft.latent.thinking import Thinker
from redraft.models.device import choose_device
from redraft.models.files import reading
from redraft.models.finite import check_finite, floats_of
from redraft.models.load import load_weights, read_raw_config, read_tokenizer

STAGES = ("autoencoder", "denoiser", "rollout")
for _config in (AutoencoderConfig, LatentDenoiserConfig):
    AutoConfig.register(_config.model_type, _config)  # transformers reads the config beside a tokenizer


def load_thinker(path: str | Path, *, device: str | torch.device | None = None) -> Thinker:
    """Load a denoiser of thoughts (or its rollout), its autoencoder and tokenizer.

    Raises ValueError where there is no such model, it is of another stage, or its files are damaged or do not fit.
    """
    path = local_path(path)
    require_stage(path, "denoiser", "rollout")
    target = choose_device(device)
    autoencoder, tokenizer = load_autoencoder(path)
    denoiser = _load(LatentDenoiser, path)
    for model in (denoiser, autoencoder):
        nn.Module.to(model, target).eval()
    return Thinker(denoiser, autoencoder, tokenizer)


def load_autoencoder(path: str | Path) -> tuple[TextAutoencoder, Any]:
    """Load an autoencoder and its tokenizer, from its own folder or from that of a model trained on it.

    Raises ValueError as `load_thinker` does, and for one without a normaliser.
    """
    path = local_path(path)
    stage = require_stage(path, *STAGES)
    autoencoder = _load(TextAutoencoder, Path(path) / (AUTOENCODER_FOLDER if stage != "autoencoder" else "")).eval()
    autoencoder.require_normalizer()
    if (tokenizer := read_tokenizer(path)) is None:
        raise ValueError(f"{path} has no tokenizer. Give the folder that its training saved.")
    return autoencoder, tokenizer


def _load(kind: Any, path: str | Path) -> Any:
    with reading(f"the model config of {path}"):
        config = kind.config_class.from_pretrained(path)
    model = load_weights(kind, path, config=config)
    check_finite(path, floats_of(model))
    return model


def require_stage(path: str | Path, *stages: str) -> str:
    """Return the stage of a folder. Raises ValueError where there is none, or one that is none of `stages`."""
    path = local_path(path)
    makers = " or ".join(f"`redraft train latent-{wanted}`" for wanted in stages)
    if not Path(path).is_dir():
        raise ValueError(f"no model at {path}: the folder does not exist. {makers} makes one.")
    stage = read_raw_config(path).get("stage")
    if stage in STAGES[1:] and not (Path(path) / AUTOENCODER_FOLDER).is_dir():
        raise ValueError(f"{path} is a checkpoint, not a finished model. Give the folder of the ended run.")
    if stage not in stages:
        actual = f"of stage {stage!r}" if stage in STAGES else "not a latent model"
        raise ValueError(f"{path} must be of stage {' or '.join(stages)}; it is {actual}. {makers} makes one.")
    return stage
