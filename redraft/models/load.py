"""Loading: a folder or a hub id becomes a denoiser and its tokenizer. No remote code is ever run."""

import os
from pathlib import Path
from typing import Any

import torch

from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_denoiser(
    path: str | Path,
    *,
    mask_token_id: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> tuple[Denoiser, Any]:
    """Load a model and its tokenizer (None where the folder has none), in evaluation mode.

    Raises ValueError where there is no such model, its class is not in transformers, weights are missing, extra, of
    another shape or cut short, or no mask token is known.
    """
    import transformers

    config = _load_config(path)
    tokenizer = _load_tokenizer(path)
    if mask_token_id is None and not getattr(config, "diffusion", None) and tokenizer is not None:
        mask_token_id = tokenizer.mask_token_id
    settings = DiffusionSettings.read_from(config, mask_token_id=mask_token_id)
    architecture = (config.architectures or ["(none)"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(f"{path}: transformers {transformers.__version__} has no class {architecture}.")
    model = _load_weights(model_class, path, config=config, dtype=dtype)
    device = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    return Denoiser(model.to(device).eval(), settings), tokenizer


def _load_config(path: str | Path) -> Any:
    from transformers import AutoConfig

    folder = Path(path)
    is_local = folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if is_local and not folder.is_dir():
        raise ValueError(
            f"no model at {path}: {'it is not a folder' if folder.exists() else 'the folder does not exist'}."
        )
    if is_local and not (folder / "config.json").exists():
        raise ValueError(f"no model at {path}: the folder has no config.json (an unfinished run?).")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        offline = " The hub is offline (HF_HUB_OFFLINE)." if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ValueError(f"cannot read a model config from {path}: {reason}{offline}") from error


def _load_tokenizer(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot read the tokenizer of {path}: {reason}") from error


def _load_weights(model_class: Any, path: str | Path, *, config: Any, dtype: str | torch.dtype) -> Any:
    from safetensors import SafetensorError

    try:
        model, info = model_class.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot read the weights of {path}: {reason}. Is a file cut short?") from error
    for what in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in info[f"{what}_keys"])
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"{path}: {len(names)} {what} weights: {shown}. The checkpoint does not fit {config.model_type}."
            )
    return model
