"""A model of latent thinking ships as any other checkpoint does."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from shipping import RECIPE, ship_tool
from tiny_thinker import tiny_thinker

from redraft import checkpoints
from redraft.cli import main
from redraft.latent.checkpoint import load_thinker


def test_a_thinker_ships_with_its_autoencoder(tmp_path, monkeypatch, capsys):
    ship = ship_tool(tmp_path, monkeypatch, name="thinker", examples='["think", "1 2 3", "--steps", "2"]')
    thinker = tiny_thinker()
    folder = tmp_path / "latent"
    thinker.denoiser.float().save_pretrained(folder)
    thinker.autoencoder.float().save_pretrained(folder / "autoencoder")
    thinker.tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(RECIPE | {"stage": "denoiser"}))
    with pytest.raises(ValueError, match="a latent model, which saves no sampler"):
        ship.ship("thinker", folder, generation={"steps": 4})
    shipped = ship.ship("thinker", folder)
    assert "autoencoder/model.safetensors" in checkpoints.read_index()["thinker"]["sha256"]
    loaded = load_thinker("redraft/thinker", device="cpu")
    assert loaded.denoiser.dtype == loaded.autoencoder.dtype == torch.float32
    with pytest.raises(SystemExit, match="0"):
        main(["think", "redraft/thinker", "1 2 3", "--steps", "2"])
    assert "thought 1:" in capsys.readouterr().out
    weights = load_file(shipped / "autoencoder" / "model.safetensors")
    save_file(weights | {"more": torch.zeros(1)}, shipped / "autoencoder" / "model.safetensors")
    with pytest.raises(ValueError, match="redraft/thinker is damaged: .*autoencoder/model.safetensors is not as"):
        load_thinker("redraft/thinker")
