"""Whether a checkpoint is of this run: the same model, minimising the same, from the same start."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redraft.models.denoiser import Denoiser
from redraft.training.checkpoint import OBJECTIVE_FILE
from redraft.training.config import RECIPE_FILE
from redraft.training.pace import Config

PLACES = ("start", "source", "tokenizer")  # what a run reads may be moved

OTHERS = {
    "stage": "another task, or from other weights than its start holds now",
    "examples": "other examples than the file of its task holds now",
}
"""What a checkpoint was trained on where a part of its identity is not the run's."""


def identity(config: Config) -> dict[str, Any]:
    """Say what a run minimises, and of thoughts on what: what the checkpoint of another run is told by."""
    saved: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    sections = ("objective", "autoencoder", "denoiser")
    told: dict[str, Any] = {name: saved[name] for name in sections if name in saved}
    for section in ("model", "data"):
        plain = {name: value for name, value in saved.get(section, {}).items() if not isinstance(value, dict)}
        told |= {section: {name: plain[name] for name in plain if name not in PLACES}} if plain else {}
    return told | config.inputs()


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
