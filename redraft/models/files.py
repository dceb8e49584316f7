"""Read the files of a checkpoint, which may be damaged or hostile; every failure is an error of one line."""

import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from redraft.settings import check_field

Raw = dict[str, Any]
"""A config.json as it stands on disk."""


@contextmanager
def reading(what: str, *, hint: str = "", passing: type[Exception] | None = None) -> Iterator[None]:
    """Turn any error that a library raises while it reads a checkpoint into a ValueError of one line.

    Errors of the type `passing` are our own and are not changed.
    """
    try:
        yield
    except Exception as error:  # damaged files fail anywhere in the libraries, with errors of any kind
        if type(error) is passing:
            raise
        raise ValueError(f"cannot read {what}: {first_line(error)}. {hint}".rstrip()) from error


def first_line(error: BaseException) -> str:
    """Shorten a library's error to one line of at most 300 characters, without a period at the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = next(iter(lines), "")
    if message.endswith(":"):  # the reason follows in the next lines
        message = " ".join(lines[:3])
    if "weights_only" in message:  # torch's message says how to run what is in the file
        return "it holds more than tensors (objects, or code), and nothing else is read from a pickle"
    if isinstance(error, KeyError) or len(message) < 4:  # a key alone
        message = f"{type(error).__name__} {message}".strip()
    return (message if len(message) <= 300 else f"{message[:300]}...").rstrip(".")


def read_json(file: Path) -> Raw:
    """Read a JSON object. Raises ValueError, in one line, where the file is none."""
    with reading(str(file)):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {file}: it must hold a JSON object; got {type(content).__name__}.")
    return content


# --- config.json -----------------------------------------------------------------------------------------------------

CUT_SHORT = "Is a file cut short?"
_LARGEST = {r"(layers?|heads?|experts|labels|groups)$": 10_000, r"(size|dim|d_model|n_embd|n_inner)$": 2**31}
"""Names of counts and sizes, and what is more than any model has."""
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("model_type", "dtype", "torch_dtype"), str),
    "architectures": tuple[str, ...],
    "diffusion": dict,
    "generation": dict,
    "mask_token_id": int,
}
"""Types of the entries of config.json that are read here."""


def check_raw(raw: Raw) -> None:
    """Raise ValueError for an entry of config.json of the wrong type, and for impossible numbers."""
    for name, kind in _KINDS.items():
        value = tuple(raw[name]) if isinstance(raw.get(name), list) else raw.get(name)
        if value is not None:
            check_field(f"config.json: {name}", value, kind)
    _check_numbers(raw)


def _check_numbers(raw: Raw) -> None:
    """Raise ValueError for a NaN, an infinity, and a size beyond every model (a config builds lists by its counts)."""
    for name, value in raw.items():
        if isinstance(value, dict):
            _check_numbers(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"config.json: {name} must be a finite number; got {value}.")
        if isinstance(value, list) and any(isinstance(one, float) and math.isnan(one) for one in value):
            raise ValueError(f"config.json: {name} must hold numbers; got NaN among them.")
        for names, largest in _LARGEST.items():
            if re.search(names, name) and isinstance(value, int | float) and value > largest:
                raise ValueError(
                    f"config.json: {name} must be at most {largest}; got {value}. Is it a model's own config?"
                )


# --- Weights ---------------------------------------------------------------------------------------------------------


def weight_files(path: str | Path) -> list[Path]:
    """Find the files of a checkpoint's weights, in a folder or on the hub; warn where they are pickles.

    Raises ValueError for a shard that is missing, or that the index looks for outside of the checkpoint.
    """
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        with reading(f"the weights of {path}"):
            file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
        return None if file is None else Path(file)

    for name in ("model.safetensors", "pytorch_model.bin"):
        index = None if find(name) is not None else find(f"{name}.index.json")
        names = [name] if index is None else _shards(index)
        files = {one: find(one) for one in names}
        missing = [one for one, file in files.items() if file is None]
        if missing and index is None:
            continue
        if missing:
            raise ValueError(
                f"cannot read the weights of {path}: {missing[0]} is missing, which {name}.index.json names."
            )
        if name.endswith(".bin"):
            warnings.warn(
                f"{path} holds its weights as pickles (.bin). Only tensors are read from them (weights_only=True); no "
                "code in them is run.",
                stacklevel=2,
            )
        return [file for file in files.values() if file is not None]
    raise ValueError(f"cannot read the weights of {path}: there is no model.safetensors. Is the folder a whole model?")


def _shards(index: Path) -> list[str]:
    """List the files that an index names. Raises ValueError for a name that leads out of its folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"cannot read {index}: weight_map must name a file for each weight.")
    names = sorted(set(shards.values()))
    for name in names:
        path = PureWindowsPath(name)  # it knows every separator and drive
        if path.anchor or not path.name or ".." in path.parts:
            raise ValueError(f"{index} names weights outside of the checkpoint: {name!r}. Such files are never read.")
    return names


def check_fit(path: str | Path, model_class: Any, config: Any, files: list[Path]) -> None:
    """Raise ValueError for a config that asks for more than the files hold, and for integer weights.

    Layers are counted before any is built, and the model is built without memory for its weights.
    """
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    kinds: dict[str, str] = {}
    with reading(f"the weights of {path}", hint=CUT_SHORT):
        for file in files:
            kinds |= _kinds(file)
    if isinstance(num_layers, int) and num_layers > len(kinds):
        raise ValueError(
            f"{path}: config.json has {num_layers} layers, and the files hold {len(kinds)} weights. Do they belong "
            "together?"
        )
    if getattr(config, "quantization_config", None) is None:
        for name, kind in kinds.items():
            if name.endswith(".weight") and kind.startswith(("I", "U", "B8", "BOOL")):
                raise ValueError(f"{path}: {name} holds integers ({kind}), but config.json has no quantization_config.")
    with reading(f"the model config of {path}"), torch.device("meta"):
        num_weights = sum(parameter.numel() for parameter in model_class(config).parameters())
    num_bytes = sum(file.stat().st_size for file in files)
    if num_weights > 8 * num_bytes:  # one bit a weight
        raise ValueError(
            f"{path}: config.json asks for {num_weights:.3g} weights, and the files hold {num_bytes:.3g} bytes. Do "
            "they belong together?"
        )


def _kinds(file: Path) -> dict[str, str]:
    """List the tensors of a file, with their kinds of numbers as safetensors names them; pickles do not tell these."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    if not zipfile.is_zipfile(file):  # torch's format before 1.6
        return dict.fromkeys(map(str, range(10_000)), "")
    with zipfile.ZipFile(file) as entries:
        return dict.fromkeys(entries.namelist(), "")
