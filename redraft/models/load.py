"""Loading: a folder or a hub id becomes a denoiser and its tokenizer. No remote code is ever run."""

import difflib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from redraft.errors import unknown_name
from redraft.models import encoder_decoder
from redraft.models.denoiser import Denoiser
from redraft.models.device import choose_device
from redraft.models.families import FAMILIES, Family, find_family, known_model_types
from redraft.models.quantize import keep_format, quantization_config
from redraft.models.settings import DiffusionSettings
from redraft.models.translations import Raw

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_denoiser(
    path: str | Path,
    *,
    mask_token_id: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantization: str | None = None,
    adapter: str | Path | None = None,
    family: str | None = None,
) -> tuple[Denoiser, Any]:
    """Load a model and its tokenizer (None where the folder has none), in evaluation mode.

    `quantization` is int8, int4 or nf4 (`models.quantize`). `adapter` is a LoRA of peft, laid over the weights; `path`
    may be one itself, which names its base. Where an adapter was trained here, its settings win. `family` names the
    format of a checkpoint whose config.json looks autoregressive (`diffullama`, `diffugpt`, `open-dcoder`; see
    docs/models.md).

    Raises ValueError where there is no such model, its class is neither in transformers nor a family, it is
    autoregressive, weights are missing, extra, of another shape or cut short, no mask token is known or it lies outside
    the vocabulary, the tokenizer is larger than the embedding, the adapter does not fit, or the quantisation does
    not suit the model or this machine.
    """
    target = choose_device(device)
    if adapter is None:
        path, adapter = split_adapter(path)
    raw = read_raw_config(path)
    of_family = find_family(raw, name=family, hub_id=str(path))
    trained_for = adapter_config(adapter).get("diffusion")
    tokenizer = load_tokenizer(adapter) if adapter and trained_for else None
    tokenizer = tokenizer or load_tokenizer(path, family=of_family)
    if mask_token_id is None and not raw.get("diffusion"):
        of_tokenizer = None if tokenizer is None else tokenizer.mask_token_id
        mask_token_id = raw.get("mask_token_id", of_tokenizer)
    config, model_class = _config_and_class(path, raw, family=of_family, mask_token_id=mask_token_id)
    config.diffusion = trained_for or getattr(config, "diffusion", None)
    settings = DiffusionSettings.read_from(config, mask_token_id=mask_token_id)
    check_tokenizer(path, tokenizer, config)
    if tokenizer is not None and tokenizer.chat_template is None and of_family is not None:
        tokenizer.chat_template = of_family.chat_template
    settings.save_to(config)
    quantizer: dict[str, Any] = {}
    if quantization is not None:
        kernel = quantization_config(quantization, config=config, model_class=model_class, device=target, dtype=dtype)
        quantizer = {"quantization_config": kernel, "device_map": {"": target}}  # packed where it will run
    model = load_weights(model_class, path, config=config, dtype=dtype, family=of_family, quantizer=quantizer)
    keep_format(model)
    if adapter is not None:
        model = attach_adapter(model, adapter).get_base_model()
    kind = encoder_decoder.EncoderDecoder if config.model_type in encoder_decoder.MODEL_TYPES else Denoiser
    return kind(model.to(target).eval(), settings), tokenizer


def split_adapter(path: str | Path) -> tuple[str | Path, str | Path | None]:
    """Tell the base and the adapter of a folder that holds an adapter; a whole model is its own base.

    Raises ValueError where the adapter does not name its base.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return path, None
    base = json.loads(file.read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"the adapter {path} does not name its base. Load the base, with adapter={str(path)!r}.")
    return base, path


def adapter_config(adapter: str | Path | None) -> Raw:
    """Read the config.json that training saved beside an adapter; empty for adapters from elsewhere."""
    file = Path(adapter or "") / "config.json"
    return json.loads(file.read_text()) if adapter and file.is_file() else {}


def _how_to_go_on(run: Path) -> str:
    """Say what may be done with the folder of a run that was stopped."""
    if not (run / "recipe.json").exists():
        return "."
    names = [file.parent.name.removeprefix("checkpoint-") for file in run.glob("checkpoint-*/config.json")]
    is_latent = '"stage"' in (run / "recipe.json").read_text(errors="replace")  # whose checkpoints are no whole models
    steps = [int(name) for name in names if name.isdigit() and not is_latent]
    use = f", or use its last checkpoint: {run}/checkpoint-{max(steps)}" if steps else ""
    return f", as its training has not ended. Go on with `redraft train {run} --resume`{use}."


def read_raw_config(path: str | Path) -> Raw:
    """Read config.json of a folder or a hub id. Raises ValueError where there is none."""
    from transformers import PreTrainedConfig

    folder = Path(path)
    is_local = folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if is_local and not folder.is_dir():
        raise ValueError(
            f"no model at {path}: {'it is not a folder' if folder.exists() else 'the folder does not exist'}."
        )
    if is_local and not (folder / "config.json").exists():
        raise ValueError(f"no model at {path}: the folder has no config.json{_how_to_go_on(folder)}")
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        offline = " The hub is offline (HF_HUB_OFFLINE)." if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ValueError(f"cannot read a model config from {path}: {reason}{offline}") from error
    return dict(raw)


def load_tokenizer(path: str | Path, *, family: Family | None = None) -> Any:
    """Load the tokenizer of a folder or a hub id; None where a folder has none."""
    import transformers

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    if family is None:
        classes = ["AutoTokenizer"]
    elif family.tokenizer_class is not None:
        classes = [family.tokenizer_class]
    else:
        classes = ["AutoTokenizer", "PreTrainedTokenizerFast"]  # the first may want a class from the checkpoint's code
    reason = ""
    for name in classes:
        try:
            return getattr(transformers, name).from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = reason or str(error).strip().splitlines()[0]
    raise ValueError(f"cannot read the tokenizer of {path}: {reason}")


def read_config(path: str | Path, raw: Raw) -> Any:
    """Read the config of an architecture that transformers has.

    Raises ValueError for one that it does not have, and for one that wants its own code to be run.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = str(raw.get("model_type"))
    if "stage" in raw and model_type.startswith("redraft-"):
        is_autoencoder = raw["stage"] == "autoencoder"
        use = f"`redraft latent check {path}`" if is_autoencoder else f"redraft.load_thinker or `redraft think {path}`"
        raise ValueError(f"{path} is of the latent stage {raw['stage']!r}, which denoises no tokens. Use {use}.")
    if model_type not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise ValueError(
                f"cannot read a model config from {path}: model_type {model_type!r} is computed by code inside the "
                f"checkpoint, which is never run. Families that load without it: {', '.join(known_model_types())}."
            )
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=3)
        error = unknown_name("model_type", model_type, [*known_model_types(), *near])
        raise ValueError(
            f"cannot read a model config from {path}: {error} `redraft convert` makes a diffusion model of any "
            "architecture of transformers."
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot read the model config of {path}: {reason}") from error


def _config_and_class(
    path: str | Path, raw: Raw, *, family: Family | None, mask_token_id: int | None
) -> tuple[Any, Any]:
    """Find the config of a checkpoint and the stock class that computes it."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if family is not None:
        return family.config(raw, mask_token_id=mask_token_id), stock_class(family)
    config = read_config(path, raw)
    architecture = (config.architectures or ["(none)"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(f"{path}: transformers {transformers.__version__} has no class {architecture}.")
    is_masked = architecture in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    if not raw.get("diffusion") and raw.get("is_causal") is not False and not is_masked:
        by_name = ", ".join(family.name for family in FAMILIES if not family.model_types)
        is_causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        raise ValueError(
            f"{path} is {'autoregressive' if is_causal else 'not a language model'} ({architecture}; its config.json "
            f"has no diffusion entry). Make it a diffusion model with `redraft convert {path} OUT` (--autoregressive "
            f"keeps it as a baseline), or name its format by family=: {by_name}."
        )
    return config, model_class


def stock_class(family: Family) -> Any:
    """Return the transformers class that computes a family."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return getattr(transformers, family.class_name or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.stock])


def check_tokenizer(path: str | Path, tokenizer: Any, config: Any) -> None:
    """Raise ValueError for a tokenizer with more tokens than the embedding has rows."""
    vocab_size = config.get_text_config().vocab_size
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens and the embedding {vocab_size} rows, so some tokens "
            "have no row. Is it another model's tokenizer?"
        )


def load_weights(
    model_class: Any,
    path: str | Path,
    *,
    config: Any,
    dtype: str | torch.dtype = "auto",
    family: Family | None = None,
    gguf_file: str | None = None,
    quantizer: dict[str, Any] | None = None,
    may_differ: Callable[[str, str], bool] = lambda what, name: False,
) -> Any:
    """Read weights through transformers' loader, tensor by tensor, renamed on the way where a family asks for it.

    Raises ValueError where a file is cut short, and where weights are missing, unexpected or of another shape, but for
    those that `may_differ("missing" | "unexpected", name)` lets pass (transformers initialises the missing ones).
    """
    from safetensors import SafetensorError
    from transformers import GgufConfig

    loader = model_class if family is None else renaming_class(model_class, family)
    options = dict(quantizer or {})
    if gguf_file:
        options |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    try:
        model, info = loader.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot read the weights of {path}: {reason}. Is a file cut short?") from error
    except ImportError as error:  # weights that were saved quantised
        raise ValueError(f"cannot read the weights of {path}: {str(error).strip().splitlines()[0]}") from error
    for what in ("missing", "unexpected", "mismatched"):
        found = (key if isinstance(key, str) else key[0] for key in info[f"{what}_keys"])
        names = sorted(name for name in found if what == "mismatched" or not may_differ(what, name))
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"{path}: {len(names)} {what} weights: {shown}. The checkpoint does not fit {config.model_type}."
            )
    if family is not None:
        model.__class__ = model_class
        model._weight_conversions = None  # so that save_pretrained writes the stock names
    return model


def renaming_class(model_class: Any, family: Family) -> Any:
    """Subclass a stock class so that transformers finds the family's renames under its name, and only there."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    conversions = family.conversions()
    if not conversions:
        return model_class
    name = f"Redraft_{family.name}_{model_class.__name__}"
    register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return type(name, (model_class,), {"__module__": __name__})


def attach_adapter(model: Any, adapter: str | Path) -> Any:
    """Lay a peft adapter over a model. Raises ValueError where it is not one or does not fit every weight."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        settings = PeftConfig.from_pretrained(str(adapter))
        weights = load_peft_weights(str(adapter), device="cpu")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot read an adapter from {adapter}: {reason}") from error
    settings.inference_mode = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft's
            warnings.filterwarnings("ignore", message=".*base_model_name_or_path.* was renamed")  # that is its purpose
            wrapped = get_peft_model(model, settings)
        result: Any = set_peft_model_state_dict(wrapped, weights)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the adapter {adapter} does not fit this model: {str(error).strip()[:300]}") from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        names = [*missing, *result.unexpected_keys]
        raise ValueError(f"the adapter {adapter} does not fit this model: {len(names)} weights, first {names[0]}.")
    return wrapped
