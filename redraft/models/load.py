"""Loading: a folder, a hub id or `redraft/NAME` becomes a denoiser and its tokenizer. No remote code is ever run."""

import copy
import difflib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from redraft.checkpoints import PREFIX, local_path, read_index
from redraft.errors import unknown_name
from redraft.models import encoder_decoder
from redraft.models.adapter import adapter_config, attach_adapter, split_adapter
from redraft.models.denoiser import Denoiser
from redraft.models.device import choose_device
from redraft.models.families import FAMILIES, find_family, known_model_types
from redraft.models.family import Family
from redraft.models.files import CUT_SHORT, Raw, check_fit, check_raw, first_line, read_json, reading, weight_files
from redraft.models.finite import check_finite, floats_of
from redraft.models.later import import_modelling
from redraft.models.probe import check_isolated
from redraft.models.quantize import keep_format, quantizer
from redraft.models.settings import DiffusionSettings
from redraft.models.template import check_template

logger = logging.getLogger(__name__)

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
    block_size: int | None = None,
) -> tuple[Denoiser, Any, Raw]:
    """Load a model in evaluation mode, its tokenizer (None where the folder has none) and its config.json.

    `quantization` is int8, int4 or nf4 (`models.quantize`). `adapter` is a LoRA of peft; `path` may be an adapter too,
    if it names its base model. If redraft trained the adapter, its diffusion settings replace those of the base.
    `family` names the family of a checkpoint whose config.json looks autoregressive (`diffullama`, `diffugpt`,
    `open-dcoder`, or MODULE:NAME, your own; see docs/models.md); `block_size` is for a checkpoint that does not state
    its block size.

    Raises ValueError where there is no such model, its class is neither in transformers nor a family, it is
    autoregressive, weights are missing, extra, of another shape or cut short, no mask token is known or it lies outside
    the vocabulary, the tokenizer is larger than the embedding, the adapter does not fit, or the quantisation does
    not suit the model or this machine.
    """
    import_modelling()
    target, path = choose_device(device), local_path(path)
    path = _last_checkpoint(Path(path)) or path
    if adapter is None:
        path, adapter = split_adapter(path)
    raw = read_raw_config(path)
    of_family = find_family(raw, name=family, hub_id=str(path))
    config: Any = _diffusion_config(path, raw) if of_family is None else None
    trained = adapter_config(adapter)
    tokenizer = read_tokenizer(adapter) if adapter and trained.get("diffusion") else None
    tokenizer = tokenizer or read_tokenizer(path, family=of_family)
    if mask_token_id is None and not raw.get("diffusion"):
        mask_token_id = raw.get("mask_token_id", None if tokenizer is None else tokenizer.mask_token_id)
    if of_family is not None:
        config = of_family.config(raw, mask_token_id=mask_token_id, block_size=block_size, path=path)
        if tokenizer is not None and tokenizer.chat_template is None:
            tokenizer.chat_template = of_family.chat_template
    config.diffusion = trained.get("diffusion") or getattr(config, "diffusion", None)
    settings = DiffusionSettings.read_from(config, mask_token_id=mask_token_id)
    check_tokenizer(path, tokenizer, config)
    settings.save_to(config)
    model_class = language_model_class(config, of_family)
    options: dict[str, Any] = {}
    if quantization is not None:
        options = quantizer(quantization, config=config, model_class=model_class, device=target, dtype=dtype)
    model = load_weights(model_class, path, config=config, dtype=dtype, family=of_family, options=options)
    keep_format(model)
    if adapter is not None:
        model = attach_adapter(model, adapter).get_base_model()
    model = model.to(target).eval()
    check_finite(path, floats_of(model))
    if of_family is None and not raw.get("diffusion"):  # an encoder as it stands, which no conversion has measured
        check = check_isolated(model, settings.mask_token_id)
        if not check.passed:
            raise ValueError(f"{path} cannot be used: the check '{check.claim}' failed ({check.measured}).")
    is_encoder_decoder = config.model_type in encoder_decoder.MODEL_TYPES
    kind = encoder_decoder.EncoderDecoder if is_encoder_decoder else Denoiser
    return kind(model, settings), tokenizer, raw | trained


# --- config.json -----------------------------------------------------------------------------------------------------


def read_raw_config(path: str | Path) -> Raw:
    """Read config.json of a folder or a hub id. Raises ValueError where there is none."""
    from huggingface_hub.constants import is_offline_mode
    from transformers import PreTrainedConfig

    if not str(path):
        raise ValueError("a model must be named, by its folder or hub id; got ''.")
    folder = Path(path)
    if folder.suffix == ".gguf":
        raise ValueError(f"{path} is a GGUF file. Convert it first: redraft convert {path} OUT.")
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        if not folder.is_dir():
            reason = "it is not a folder." if folder.exists() else f"the folder does not exist.{_near(folder)}"
            raise ValueError(f"no model at {path}: {reason}")
        if not (folder / "config.json").exists():
            raise ValueError(f"no model at {path}: the folder has no config.json{_how_to_continue(folder)}")
        raw = read_json(folder / "config.json")
        if (folder / "generation_config.json").is_file():
            read_json(folder / "generation_config.json")  # transformers reads it with the weights
    else:
        try:
            raw, _ = PreTrainedConfig.get_config_dict(path)
        except Exception as error:  # the hub's client fails with errors of many types
            near = _near(folder)
            if folder.parent != Path() and folder.parent.is_dir():  # runs/nope: a folder was meant
                reason = f"the folder does not exist, and the hub gave none.{near}"
                raise ValueError(f"no model at {path}: {reason}") from error
            if not near and str(path) in read_index():
                near = f" Did you mean {PREFIX}{path}?"
            hint = f"{' The hub is offline (HF_HUB_OFFLINE).' if is_offline_mode() else ''}{near}"
            raise ValueError(f"cannot read a model config from {path}: {first_line(error)}.{hint}") from error
    check_raw(raw)
    return dict(raw)


def _last_checkpoint(run: Path) -> Path | None:
    """Find the newest checkpoint of a run whose training has not ended, and say that it is used; None for others."""
    recipe = run / "recipe.json"
    if (run / "config.json").exists() or not recipe.exists() or '"stage"' in recipe.read_text(errors="replace"):
        return None  # the checkpoints of latent stages are no whole models
    names = [file.parent.name.removeprefix("checkpoint-") for file in run.glob("checkpoint-*/config.json")]
    steps = [int(name) for name in names if name.isdigit()]
    if not steps:
        return None
    newest = run / f"checkpoint-{max(steps)}"
    logger.warning("the training of %s has not ended: using its last checkpoint, %s", run, newest.name)
    return newest


def _how_to_continue(run: Path) -> str:
    """Name the command for the folder of a run that was stopped before its first checkpoint."""
    if not (run / "recipe.json").exists():
        return "."
    return f", as its training has not ended. Continue it with `redraft train {run} --resume`."


def _near(folder: Path) -> str:
    """Name folders beside one that does not exist: those of a similar name, or, in a parent that is named, all."""
    parent = folder.parent
    names = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, n=3)
    if near:
        return f" Did you mean {' or '.join(str(parent / name) for name in near)}?"
    return f" {parent} holds {', '.join(names[:8])}." if names and parent not in (Path(), Path("/")) else ""


def read_config(path: str | Path, raw: Raw) -> Any:
    """Read the config of an architecture that transformers has.

    Raises ValueError for one that it does not have, and for one that needs code from the checkpoint.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = str(raw.get("model_type"))
    if "stage" in raw and model_type.startswith("redraft-"):
        is_autoencoder = raw["stage"] == "autoencoder"
        use = f"`redraft think --check {path}`" if is_autoencoder else f"redraft.load_thinker or `redraft think {path}`"
        raise ValueError(f"{path} is a latent {raw['stage']} and does not denoise tokens. Use {use}.")
    if model_type not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise ValueError(
                f"cannot read a model config from {path}: model_type {model_type!r} is computed by code inside the "
                f"checkpoint, which is never run. Families that load without it: {', '.join(known_model_types())}."
            )
        error = unknown_name("model_type", model_type, known_model_types())
        raise ValueError(
            f"cannot read a model config from {path}: {error} `redraft convert` makes a diffusion model of any "
            "architecture of transformers."
        )
    with reading(f"the model config of {path}"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def is_encoder(config: Any) -> bool:
    """Tell whether transformers has a masked language model of this architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def language_model_class(config: Any, family: Family | None = None) -> Any:
    """Return the class with a vocabulary head: the masked language model of an encoder, else the causal one.

    Raises ValueError where transformers has neither.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    name = names.get(config.model_type) if family is None or family.class_name is None else family.class_name
    if name is None:
        raise ValueError(
            f"transformers has no language model of architecture {config.model_type!r}, so it has no head."
        )
    return getattr(transformers, name)


def _diffusion_config(path: str | Path, raw: Raw) -> Any:
    """Read the config of a diffusion model that is no family's. Raises ValueError for an autoregressive model."""
    config = read_config(path, raw)
    architecture, stock = (config.architectures or ["(none)"])[0], language_model_class(config).__name__
    if architecture != stock:
        raise ValueError(
            f"{path}: {architecture} is not transformers' class with a vocabulary head for model_type "
            f"{config.model_type!r}, which is {stock}."
        )
    if not raw.get("diffusion") and raw.get("is_causal") is not False and not is_encoder(config):
        by_name = ", ".join(family.name for family in FAMILIES if not family.model_types)
        raise ValueError(
            f"{path} is autoregressive ({architecture}; its config.json has no diffusion entry). Make it a diffusion "
            f"model with `redraft convert {path} OUT` (--autoregressive keeps "
            f"it as a baseline), or name its format by family=: {by_name}, or your own MODULE:NAME."
        )
    return config


# --- The tokenizer ---------------------------------------------------------------------------------------------------


def read_tokenizer(path: str | Path, *, family: Family | None = None) -> Any:
    """Read the tokenizer of a folder or a hub id; None where a folder has none."""
    import transformers

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    classes = ["AutoTokenizer"]
    if family is not None:  # AutoTokenizer may need a class from the checkpoint's code
        classes = [family.tokenizer_class] if family.tokenizer_class else ["AutoTokenizer", "PreTrainedTokenizerFast"]
    reasons = []
    for name in classes:
        try:
            tokenizer = getattr(transformers, name).from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # as in `files.reading`
            reasons.append(first_line(error))
            continue
        length = tokenizer.model_max_length
        if not isinstance(length, int | float):
            raise ValueError(f"cannot read the tokenizer of {path}: model_max_length must be a number; got {length!r}.")
        check_template(path, tokenizer.chat_template)
        return tokenizer
    raise ValueError(f"cannot read the tokenizer of {path}: {reasons[0]}.")


def check_tokenizer(path: str | Path, tokenizer: Any, config: Any) -> None:
    """Raise ValueError for a tokenizer with more tokens than the embedding has rows."""
    vocab_size = config.get_text_config().vocab_size
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens and the embedding {vocab_size} rows, so some tokens "
            "have no row. Is it another model's tokenizer?"
        )


# --- Weights ---------------------------------------------------------------------------------------------------------


def load_weights(
    model_class: Any,
    path: str | Path,
    *,
    config: Any,
    dtype: str | torch.dtype = "auto",
    family: Family | None = None,
    gguf_file: str | None = None,
    options: Raw | None = None,
    may_differ: Callable[[str, str], bool] = lambda what, name: False,
) -> Any:
    """Read weights through transformers' loader, tensor by tensor, renamed on the way where a family asks for it.

    `options` are further arguments of `from_pretrained`. Raises ValueError where a file is cut short, and where weights
    are missing, unexpected or of another shape, but for those that `may_differ("missing" | "unexpected", name)` lets
    pass (transformers initialises the missing ones).
    """
    from transformers import GgufConfig

    loader = model_class if family is None else renaming_class(model_class, family)
    chosen = dict(options or {})
    if gguf_file:
        chosen |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    else:
        check_fit(path, model_class, copy.deepcopy(config), weight_files(path))
    with reading(f"the weights of {path}", hint=CUT_SHORT):
        model, info = loader.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **chosen
        )
    for what in ("missing", "unexpected", "mismatched"):
        keys = (key if isinstance(key, str) else key[0] for key in info[f"{what}_keys"])
        names = sorted(name for name in keys if what == "mismatched" or not may_differ(what, name))
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

    if not family.weights:
        return model_class
    name = f"Redraft_{family.name}_{model_class.__name__}"
    register_checkpoint_conversion_mapping(name, family.conversions(), overwrite=True)
    return type(name, (model_class,), {"__module__": __name__})
