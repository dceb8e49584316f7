"""Whether a checkpoint is of this run: the same model, minimising the same, from the same start."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redraft.latent.checkpoint import AUTOENCODER_FOLDER
from redraft.models.denoiser import Denoiser
from redraft.training.checkpoint import OBJECTIVE_FILE, hash_of
from redraft.training.config import RECIPE_FILE
from redraft.training.latent_config import LatentRunConfig
from redraft.training.pace import Config

PLACES = ("start", "source", "tokenizer", "cache_dir")  # what a run reads may be moved

OTHERS = {
    "stage": "another task, or from other weights than its start holds now",
    "examples": "other examples than the file of its task holds now",
}
"""What a checkpoint was trained on where a part of its identity is not the run's."""


def identity(config: Config) -> dict[str, Any]:
    """Say what a run minimises, and of thoughts on what: what the checkpoint of another run is told by."""
    saved: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    told = {name: saved[name] for name in ("objective", "autoencoder", "denoiser", "rollout") if name in saved}
    for section in ("model", "data"):
        plain = {name: value for name, value in saved.get(section, {}).items() if not isinstance(value, dict)}
        told |= {section: {name: plain[name] for name in plain if name not in PLACES}} if plain else {}
    if isinstance(config, LatentRunConfig):
        told["stage"] = {"task": config.task, "start": _weights(config.start)}
        task = config.task
    else:
        task = config.data.source if config.data.kind == "thought" else None
    if task is not None and task.endswith(".jsonl"):
        told["examples"] = {"hash": hash_of(Path(task))}
    return told


def _weights(start: str | None) -> list[str]:
    """Hash the weights that a latent stage begins from."""
    folders = [] if start is None else [Path(start), Path(start) / AUTOENCODER_FOLDER]
    weights = [folder / "model.safetensors" for folder in folders]
    return [hash_of(path) for path in weights if path.exists()]


def check_identity(checkpoint: Path, wanted: dict[str, Any]) -> None:
    """Raise ValueError for a checkpoint of another `identity`; one of an earlier version does not say all of it."""
    if (checkpoint / OBJECTIVE_FILE).exists():
        saved = json.loads((checkpoint / OBJECTIVE_FILE).read_text())
        for part, other in OTHERS.items():
            if saved.get(part, wanted.get(part)) != wanted.get(part):
                raise ValueError(
                    f"{checkpoint} was trained on {other}. Put them back, or start a new run with another --out."
                )
        for section, values in wanted.items():
            known = {name: value for name, value in values.items() if name in saved.get(section, {})}
            _require_same(checkpoint, saved.get(section, {}), known)


def check_settings(checkpoint: Path, denoiser: Denoiser) -> None:
    """Raise ValueError for a checkpoint of another model: a recipe that was edited, a folder that was copied."""
    saved = json.loads((checkpoint / "config.json").read_text()).get("diffusion", {})
    _require_same(checkpoint, saved, asdict(denoiser.settings))


def _require_same(checkpoint: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{checkpoint} was trained with {name} {saved.get(name)!r}, not {value!r} as {RECIPE_FILE} has it now. "
                "Take the change back, or start a new run with another --out."
            )
