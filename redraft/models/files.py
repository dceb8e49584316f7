"""Files of a checkpoint, which may be damaged or hostile: read them, or end in one line."""

import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

from redraft.models.translations import Raw


@contextmanager
def reading(what: str, *, hint: str = "", passing: type[Exception] | None = None) -> Iterator[None]:
    """Turn whatever a library raises while it reads a checkpoint into a ValueError of one line; `passing` is ours."""
    try:
        yield
    except Exception as error:  # damaged files fail anywhere in the libraries, with errors of any kind
        if type(error) is passing:
            raise
        raise ValueError(f"cannot read {what}: {first_line(error)}. {hint}".rstrip()) from error


def first_line(error: BaseException) -> str:
    """Return what a library's error says, as one line that is short enough to be read, without its last stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next(iter(lines), "")
    if said.endswith(":"):  # the reason stands in the lines below
        said = " ".join(lines[:3])
    if "weights_only" in said:  # torch's message says how to run what is in the file
        return "it holds more than tensors (objects, or code), and nothing else is read from a pickle"
    if isinstance(error, KeyError) or len(said) < 4:  # a key alone
        said = f"{type(error).__name__} {said}".strip()
    return (said if len(said) <= 300 else f"{said[:300]}...").rstrip(".")


def read_json(file: Path) -> Raw:
    """Read a JSON object. Raises ValueError, in one line, where the file is none."""
    with reading(str(file)):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {file}: it must hold a JSON object; got {type(content).__name__}.")
    return content


# --- config.json -----------------------------------------------------------------------------------------------------

_COUNTS = re.compile(r"(layers?|heads?|experts|labels|groups)$")
_SIZES = re.compile(r"(size|dim|d_model|n_embd|n_inner)$")
CUT_SHORT = "Is a file cut short?"
MOST_OF_A_COUNT, MOST_OF_A_SIZE = 10_000, 2**31


_KINDS: dict[str, Any] = {
    "model_type": str,
    "architectures": list,
    "dtype": str,
    "torch_dtype": str,
    "diffusion": dict,
    "generation": dict,
    "mask_token_id": int,
}


def check_kinds(raw: Raw) -> None:
    """Raise ValueError for an entry of config.json that is read here and is not of its kind."""
    for name, kind in _KINDS.items():
        value = raw.get(name)
        is_fine = value is None or isinstance(value, kind)
        if not is_fine or (kind is list and not all(isinstance(one, str) for one in value or ())):
            raise ValueError(f"config.json: {name} must be a JSON {_JSON[kind]}; got {value!r:.100}.")


_JSON = {str: "text", list: "list of texts", dict: "object", int: "whole number"}


def check_numbers(raw: Raw, *, where: str = "config.json") -> None:
    """Raise ValueError for a NaN, an infinity, and a size beyond every model (a config builds lists by its counts)."""
    for name, value in raw.items():
        if isinstance(value, dict):
            check_numbers(value, where=where)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {name} must be a finite number; got {value}.")
        if isinstance(value, list) and any(isinstance(one, float) and math.isnan(one) for one in value):
            raise ValueError(f"{where}: {name} must hold numbers; got NaN among them.")
        most = MOST_OF_A_COUNT if _COUNTS.search(name) else MOST_OF_A_SIZE if _SIZES.search(name) else math.inf
        if isinstance(value, int | float) and value > most:
            raise ValueError(f"{where}: {name} must be at most {most}; got {value}. Is it a model's own config?")


# --- Weights ---------------------------------------------------------------------------------------------------------


def weight_files(path: str | Path) -> list[Path]:
    """Find the files of a checkpoint's weights, in a folder or on the hub; warn where they are pickles.

    Raises ValueError for a shard that is missing, or that the index looks for outside of the checkpoint.
    """
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        with reading(f"the weights of {path}"):
            found = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    for name in ("model.safetensors", "pytorch_model.bin"):
        if (whole := find(name)) is not None:
            files: list[Path | None] = [whole]
        elif (index := find(f"{name}.index.json")) is not None:
            names = _shards(index)
            files = [find(shard) for shard in names]
            if missing := [shard for shard, file in zip(names, files, strict=True) if file is None]:
                raise ValueError(
                    f"cannot read the weights of {path}: {missing[0]} is missing, which {index.name} names."
                )
        else:
            continue
        if name.endswith(".bin"):
            warnings.warn(
                f"{path} holds its weights as pickles (.bin). Only tensors are read from them (weights_only=True); no "
                "code in them is run.",
                stacklevel=2,
            )
        return [file for file in files if file is not None]
    raise ValueError(f"cannot read the weights of {path}: there is no model.safetensors. Is the folder a whole model?")


def _shards(index: Path) -> list[str]:
    """List the files that an index names. Raises ValueError for a name that leads out of its folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"cannot read {index}: weight_map must name a file for each weight.")
    names = sorted(set(shards.values()))
    for name in names:
        path = PureWindowsPath(name)  # which knows every separator and drive; links are the user's own, or the hub's
        if path.anchor or not path.name or ".." in path.parts:
            raise ValueError(f"{index} looks for weights outside of the checkpoint: {name!r}, which is never read.")
    return names


def check_size(path: str | Path, skeleton: Any, files: list[Path]) -> None:
    """Raise ValueError for a config that asks for more memory than the files could fill, before any is taken."""
    num_bytes = sum(file.stat().st_size for file in files)
    asked = sum(parameter.numel() for parameter in skeleton.parameters())
    if asked > 8 * num_bytes:  # one bit a weight
        raise ValueError(
            f"{path}: config.json asks for {asked:.3g} weights, and the files hold {num_bytes:.3g} bytes. Do they "
            "belong together?"
        )


def check_layers(path: str | Path, config: Any, files: list[Path]) -> None:
    """Raise ValueError for more layers than the files have tensors, before one is built, and for integer weights."""
    asked = getattr(config.get_text_config(), "num_hidden_layers", 0)
    kinds: dict[str, str] = {}
    with reading(f"the weights of {path}", hint=CUT_SHORT):
        for file in files:
            kinds |= _kinds(file)
    if isinstance(asked, int) and asked > len(kinds):
        raise ValueError(
            f"{path}: config.json has {asked} layers, and the files hold {len(kinds)} weights. Do they belong together?"
        )
    if getattr(config, "quantization_config", None) is None:
        for name, kind in kinds.items():
            if name.endswith(".weight") and kind.startswith(("I", "U", "B8", "BOOL")):
                raise ValueError(f"{path}: {name} holds integers ({kind}), and config.json says of no quantisation.")


def _kinds(file: Path) -> dict[str, str]:
    """List the tensors of a file, with their kinds of numbers as safetensors names them; pickles do not tell these."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    if not zipfile.is_zipfile(file):  # torch's format before 1.6
        return dict.fromkeys(map(str, range(MOST_OF_A_COUNT)), "")
    with zipfile.ZipFile(file) as entries:
        return dict.fromkeys(entries.namelist(), "")
