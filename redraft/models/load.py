"""Loading: a folder or a hub id becomes a denoiser and its tokenizer. No remote code is ever run."""

import copy
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from redraft.errors import unknown_name
from redraft.models import encoder_decoder
from redraft.models.adapter import adapter_config, attach_adapter, split_adapter
from redraft.models.denoiser import Denoiser
from redraft.models.device import choose_device
from redraft.models.families import FAMILIES, Family, find_family, known_model_types
from redraft.models.files import (
    CUT_SHORT,
    check_kinds,
    check_layers,
    check_numbers,
    check_size,
    first_line,
    read_json,
    reading,
    weight_files,
)
from redraft.models.finite import check_finite, floats_of
from redraft.models.probe import check_isolated
from redraft.models.quantize import keep_format, quantization_config
from redraft.models.settings import DiffusionSettings
from redraft.models.template import check_template
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
    block_size: int | None = None,
) -> tuple[Denoiser, Any]:
    """Load a model and its tokenizer (None where the folder has none), in evaluation mode.

    `quantization` is int8, int4 or nf4 (`models.quantize`). `adapter` is a LoRA of peft, laid over the weights; `path`
    may be one itself, which names its base. Where an adapter was trained here, its settings win. `family` names the
    format of a checkpoint whose config.json looks autoregressive (`diffullama`, `diffugpt`, `open-dcoder`; see
    docs/models.md); `block_size` tells the blocks of one that does not say them.

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
    if of_family is None:
        config, model_class = _config_and_class(path, raw)
    trained_for = adapter_config(adapter).get("diffusion")
    tokenizer = load_tokenizer(adapter) if adapter and trained_for else None
    tokenizer = tokenizer or load_tokenizer(path, family=of_family)
    if mask_token_id is None and not raw.get("diffusion"):
        of_tokenizer = None if tokenizer is None else tokenizer.mask_token_id
        mask_token_id = raw.get("mask_token_id", of_tokenizer)
    if of_family is not None:
        config = of_family.config(raw, mask_token_id=mask_token_id, block_size=block_size, path=path)
        model_class = stock_class(of_family)
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
    model = model.to(target).eval()
    check_finite(path, floats_of(model))
    if of_family is None and not raw.get("diffusion"):  # an encoder as it stands, which no conversion has measured
        check = check_isolated(model, settings.mask_token_id)
        if not check.passed:
            raise ValueError(f"{path} cannot be used: not true that {check.claim} ({check.measured}).")
    return kind(model, settings), tokenizer


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

    if not str(path):
        raise ValueError("a model must be named, by its folder or hub id; got ''.")
    folder = Path(path)
    is_local = folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if folder.suffix == ".gguf":
        raise ValueError(f"{path} is a GGUF file. Convert it first: redraft convert {path} OUT.")
    if is_local and not folder.is_dir():
        reason = "it is not a folder." if folder.exists() else f"the folder does not exist.{_near(folder)}"
        raise ValueError(f"no model at {path}: {reason}")
    if is_local and not (folder / "config.json").exists():
        raise ValueError(f"no model at {path}: the folder has no config.json{_how_to_go_on(folder)}")
    if is_local:
        raw = read_json(folder / "config.json")
        if (folder / "generation_config.json").is_file():
            read_json(folder / "generation_config.json")  # transformers reads it with the weights
    elif folder.parent != Path() and folder.parent.is_dir():  # runs/nope: as it stands, but perhaps the hub's
        try:
            raw, _ = PreTrainedConfig.get_config_dict(path)
        except Exception as error:  # whatever the hub says, a folder was meant
            raise ValueError(
                f"no model at {path}: the folder does not exist, and the hub gave none.{_near(folder)}"
            ) from error
    else:
        with reading(f"a model config from {path}", hint=f"{_offline()}{_near(folder)}".strip()):
            raw, _ = PreTrainedConfig.get_config_dict(path)
    check_kinds(raw)
    check_numbers(raw)
    return dict(raw)


def _offline() -> str:
    from huggingface_hub.constants import is_offline_mode

    return "The hub is offline (HF_HUB_OFFLINE)." if is_offline_mode() else ""


def _near(folder: Path) -> str:
    """Name the folders beside one that does not exist: those of a similar name, or, below the working folder, all."""
    parent = folder.parent
    names = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, n=3)
    if near:
        return f" Did you mean {' or '.join(str(parent / name) for name in near)}?"
    return f" {parent} holds {', '.join(names[:8])}." if names and parent not in (Path(), Path("/")) else ""


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
    reasons = []
    for name in classes:
        try:
            tokenizer = getattr(transformers, name).from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # as in `files.reading`
            reasons.append(first_line(error))
            continue
        if not isinstance(tokenizer.model_max_length, int | float):
            length = tokenizer.model_max_length
            raise ValueError(f"cannot read the tokenizer of {path}: model_max_length must be a number; got {length!r}.")
        check_template(path, tokenizer.chat_template)
        return tokenizer
    raise ValueError(f"cannot read the tokenizer of {path}: {reasons[0]}.")


def read_config(path: str | Path, raw: Raw) -> Any:
    """Read the config of an architecture that transformers has.

    Raises ValueError for one that it does not have, and for one that wants its own code to be run.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = str(raw.get("model_type"))
    if "stage" in raw and model_type.startswith("redraft-"):
        is_autoencoder = raw["stage"] == "autoencoder"
        use = f"`redraft think --check {path}`" if is_autoencoder else f"redraft.load_thinker or `redraft think {path}`"
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
    with reading(f"the model config of {path}"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _config_and_class(path: str | Path, raw: Raw) -> tuple[Any, Any]:
    """Find the config of a checkpoint that is no family's, and the stock class that computes it."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config = read_config(path, raw)
    architecture = (config.architectures or ["(none)"])[0]
    is_masked = architecture in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    is_causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    model_class = getattr(transformers, architecture, None) if is_masked or is_causal else None
    if model_class is None or not isinstance(config, model_class.config_class):
        raise ValueError(
            f"{path}: transformers {transformers.__version__} has no class {architecture} with a vocabulary head for "
            f"model_type {config.model_type!r}."
        )
    if not raw.get("diffusion") and raw.get("is_causal") is not False and not is_masked:
        by_name = ", ".join(family.name for family in FAMILIES if not family.model_types)
        raise ValueError(
            f"{path} is autoregressive ({architecture}; its config.json has no diffusion entry). Make it a diffusion "
            f"model with `redraft convert {path} OUT` (--autoregressive "
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
    from transformers import GgufConfig

    loader = model_class if family is None else renaming_class(model_class, family)
    options = dict(quantizer or {})
    if gguf_file:
        options |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    else:
        files = weight_files(path)
        check_layers(path, config, files)
        with reading(f"the model config of {path}"), torch.device("meta"):
            skeleton = model_class(copy.deepcopy(config))
        check_size(path, skeleton, files)
    with reading(f"the weights of {path}", hint=CUT_SHORT):
        model, info = loader.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
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
