"""Make a checkpoint that ships from a finished run: `python tools/ship.py NAME RUN [--eval RESULTS ...]`.

Writes redraft/checkpoints/NAME (weights, tokenizer, recipe, card) and its entry in index.json. The matrices are cast to
bfloat16 and vectors are not; config.json says float32, so that a model computes in float32 wherever it is loaded. No
optimizer state is copied. What the run does not say stands in tools/checkpoints.toml. The same command writes the same
files: run it first without --eval, evaluate `redraft/NAME`, and run it again with the folders of the results. Commit,
machine and minutes of the training are kept as long as the weights are the same.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from redraft import checkpoints
from redraft.cli.common import be_quiet
from redraft.cli.models import example_command
from redraft.errors import check_names, unknown_name
from redraft.folders import hash_of, write_whole
from redraft.language_model import load
from redraft.latent.checkpoint import load_thinker
from redraft.latent.config import AUTOENCODER_FOLDER
from redraft.training.callbacks import LOG_FILE, read_log
from redraft.training.config import RECIPE_FILE

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tools" / "checkpoints.toml"
MAX_BYTES = 60_000_000
"""Of all checkpoints together."""
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
NEEDED = ("description", "commands", "licence", "data", "limits", "examples")
OPTIONAL = ("generation", "scores", "commit", "machine", "minutes")
Entry = dict[str, Any]


def ship(name: str, run: Path, *, results: Sequence[Path] = (), generation: Entry | None = None) -> Path:
    """Write the folder of a checkpoint and its entry in the index; nothing changes where an error is found.

    Raises ValueError for a name without a table, for a run that has not ended or whose model does not load, for a
    sampler of a latent model, and where all checkpoints together would exceed `MAX_BYTES`.
    """
    table, index = read_table(name), checkpoints.read_index()
    recipe = portable(_read(run / RECIPE_FILE, run)) | {"out": f"runs/{name}"}
    with TemporaryDirectory(dir=checkpoints.FOLDER, prefix=".ship-") as staging:
        folder = Path(staging) / name
        folder.mkdir()
        _copy_model(run, folder, generation or table.get("generation"))
        write_json(folder / RECIPE_FILE, recipe)
        num_parameters = _count_parameters(folder)
        _check_loads(folder)
        entry = {
            "description": table["description"],
            "parameters": num_parameters,
            "bytes": 0,
            "licences": {"weights": table["licence"], "data": table["data"]},
            "scores": [*(score for one in results for score in read_scores(one)), *table.get("scores", ())],
            "commands": table["commands"],
            "seed": recipe["train"]["seed"],
            **_facts_of_training(table, run, known=_entry_of_same_weights(folder, index.get(name))),
            "examples": table["examples"],
            "sha256": {},
        }
        (folder / CARD).write_text(card(name, entry, table, folder), encoding="utf-8")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        entry["bytes"] = sum(path.stat().st_size for path in files)
        entry["sha256"] = {path.relative_to(folder).as_posix(): hash_of(path, "sha256") for path in files}
        total = entry["bytes"] + sum(other["bytes"] for known, other in index.items() if known != name)
        if total > MAX_BYTES:
            raise ValueError(
                f"all checkpoints together must have at most {MAX_BYTES / 1e6:g} MB; with {name} of "
                f"{entry['bytes'] / 1e6:.1f} MB they have {total / 1e6:.1f}. Ship a smaller one, or remove another."
            )
        target = checkpoints.FOLDER / name
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    write_json(checkpoints.FOLDER / checkpoints.INDEX_FILE, dict(sorted((index | {name: entry}).items())))
    return target


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_table(name: str) -> Entry:
    """Read what tools/checkpoints.toml says about a checkpoint. Raises ValueError for what is missing or unknown."""
    tables = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    if name not in tables:
        raise unknown_name(f"table of {TABLE.name}", name, tables)
    check_names(f"entry of {name} in {TABLE.name}", tables[name], (*NEEDED, *OPTIONAL))
    if missing := [entry for entry in NEEDED if not tables[name].get(entry)]:
        raise ValueError(f"{TABLE.name} must say for {name}: {', '.join(missing)}.")
    return tables[name]


def read_scores(folder: Path) -> list[Entry]:
    """Read the scores in the results of `redraft eval`; a standard error is that of the mean over the items."""
    results = _read(folder / "results.json", folder)
    return [
        {
            "task": portable(task["task"]),
            "unit": unit.replace("_", " "),
            "value": interval["mean"],
            "standard_error": (interval["high"] - interval["low"]) / (2 * 1.96),
            "items": interval["count"],
            "command": portable(results["provenance"]["command"]),
        }
        for task in results["tasks"]
        for unit, interval in task["scores"].items()
    ]


_FOLDERS = re.compile(r"""(?:^|(?<=[\s:,='"]))/(?:[^\s:,'"/]+/)*(?=[^\s/])""")
"""Of an absolute path, all but its last part."""


def portable(value: Any) -> Any:
    """Shorten absolute paths to their last part: they mean nothing on another machine."""
    if isinstance(value, dict):
        return {key: portable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [portable(one) for one in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _read(file: Path, run: Path) -> Entry:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{run} has no {file.name}. Give the folder of a finished run or evaluation.") from error


def write_json(file: Path, value: Any) -> None:
    """Write JSON as people read it."""
    write_whole(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# --- The model -------------------------------------------------------------------------------------------------------


def _copy_model(run: Path, folder: Path, generation: Entry | None) -> None:
    """Write weights, config and tokenizer; of a latent model also its autoencoder."""
    if (run / "adapter_config.json").exists():
        raise ValueError(f"{run} is an adapter. Merge it first: redraft convert {run} OUT.")
    config = _read(run / CONFIG, run)
    if generation and "stage" in config:
        raise ValueError(f"{run} is a latent model, which saves no sampler; got generation {generation}. Leave it out.")
    if generation:
        config["generation"] = generation
    _cast(run, folder, config)
    if (run / AUTOENCODER_FOLDER).is_dir():
        (folder / AUTOENCODER_FOLDER).mkdir()
        autoencoder = run / AUTOENCODER_FOLDER
        _cast(autoencoder, folder / AUTOENCODER_FOLDER, _read(autoencoder / CONFIG, autoencoder))
    for file in (run / name for name in TOKENIZER):
        if file.exists():
            shutil.copyfile(file, folder / file.name)


def _cast(run: Path, folder: Path, config: Entry) -> None:
    """Write config.json, and the weights with every matrix in bfloat16."""
    if not (run / WEIGHTS).exists():
        raise ValueError(f"{run} has no {WEIGHTS}. Give the folder of a finished run.")
    write_json(folder / CONFIG, config | {"dtype": "float32"})
    weights = load_file(run / WEIGHTS)
    kinds = {True: torch.bfloat16, False: torch.float32}
    cast = {name: w.to(kinds[w.ndim > 1]) if w.is_floating_point() else w for name, w in weights.items()}
    save_file(cast, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors lets nobody else read it


def _count_parameters(folder: Path) -> int:
    return sum(tensor.numel() for file in folder.rglob(WEIGHTS) for tensor in load_file(file).values())


def _check_loads(folder: Path) -> None:
    """Load the model and resolve its sampler, with the errors of both."""
    if "stage" in _read(folder / CONFIG, folder):
        load_thinker(folder, device="cpu")
    else:
        load(folder, device="cpu").sampling_config()


def _entry_of_same_weights(folder: Path, entry: Entry | None) -> Entry:
    """Return an entry of the index if its weights are those of the folder, else an empty one."""
    is_same = entry is not None and entry["sha256"].get(WEIGHTS) == hash_of(folder / WEIGHTS, "sha256")
    return entry if entry and is_same else {}


def _facts_of_training(table: Entry, run: Path, *, known: Entry) -> Entry:
    """Collect steps, minutes, machine and commit: as the table says, else as is known, else of here and now."""
    log = read_log(run / LOG_FILE) if (run / LOG_FILE).exists() else []
    seconds = sum(line.get("train_runtime", 0.0) for line in log)
    now = {"commit": _commit(), "machine": _machine(), "minutes": round(seconds / 60, 1)}
    return {"steps": max((line.get("step", 0) for line in log), default=0)} | {
        fact: table.get(fact, known.get(fact, value)) for fact, value in now.items()
    }


def _commit() -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def _machine() -> str:
    """Name the processor and the number of cores."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores, {model}"


# --- The card --------------------------------------------------------------------------------------------------------


def card(name: str, entry: Entry, table: Entry, folder: Path) -> str:
    """Write the card of a checkpoint."""
    config = _read(folder / CONFIG, folder)
    kind = (config.get("architectures") or [config.get("model_type")])[0]
    scores = [
        f"| {one['task']} | {one['unit']} | {one['value']:.4g} | {one['standard_error']:.2g} | {one['items']} "
        f"| `{one['command']}` |"
        for one in entry["scores"]
    ]
    sections = [
        f"# {checkpoints.PREFIX}{name}",
        table["description"],
        "## What it is",
        _list(
            f"{kind}, {entry['parameters'] / 1e6:.2f} M parameters, vocabulary of {config.get('vocab_size')} tokens; "
            "matrices stored in bfloat16, computed in float32",
            *(f"`{key}`: `{json.dumps(config[key])}`" for key in ("diffusion", "generation") if config.get(key)),
            f"Licence of the weights: {table['licence']}",
            *(f"Data: {source}" for source in table["data"]),
        ),
        "## How it was made",
        "```bash\n" + "\n".join(table["commands"]) + "\n```",
        f"{entry['steps']} steps in {entry['minutes']:g} minutes (of the last command), {entry['machine']}, seed "
        f"{entry['seed']}, at commit {entry['commit']}. All settings are in {RECIPE_FILE}.",
        "## Scores",
        "\n".join(["| task | score | value | standard error | items | command |", "|---|---|---|---|---|---|", *scores])
        if scores
        else "None were measured.",
        "## Samples",
        "```bash\n" + "\n".join(example_command(name, example) for example in table["examples"]) + "\n```",
        "docs/samples.md has ten unselected samples, made by `python tools/samples.py`.",
        "## Limits",
        _list(*table["limits"]),
    ]
    return "\n\n".join(sections) + "\n"


def _list(*lines: str) -> str:
    return "\n".join(f"- {line}" for line in lines)


def parse_settings(pairs: Sequence[str]) -> Entry:
    """Read KEY=VALUE pairs; a value is JSON where it can be read as such, else a text."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--generation takes KEY=VALUE; got {pair!r}.")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Ship one checkpoint; a mistake is one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", metavar="NAME", help="its table in tools/checkpoints.toml")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")
    parser.add_argument("--eval", metavar="RESULTS", type=Path, nargs="+", default=[], help="folders of redraft eval")
    parser.add_argument("--generation", metavar="KEY=VALUE", nargs="+", default=[], help="the sampler to save, whole")
    args = parser.parse_args(arguments)
    be_quiet()
    try:
        folder = ship(args.name, args.run, results=args.eval, generation=parse_settings(args.generation))
    except ValueError as error:
        print(f"ship.py: {error}", file=sys.stderr)
        return 2
    entry = checkpoints.read_index()[args.name]
    print(f"{folder}: {entry['parameters'] / 1e6:.2f} M parameters, {entry['bytes'] / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
