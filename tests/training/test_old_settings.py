"""Recipes of earlier versions are read, or refused by one line."""

import json
from dataclasses import asdict, replace

import pytest

from redraft.latent.config import WORDS
from redraft.recipes import RECIPES
from redraft.training.config import RunConfig
from redraft.training.old_settings import FIXED, IGNORED, NEW_VALUES, RENAMED

DEFAULTS = {
    "train.keep_checkpoints": 2,
    "train.eval_every": 30,
    "train.report_to": ["tensorboard"],
    "data.cache_dir": None,
    "data.chat.block_size": 32,
    "data.thought.fill": False,
}


def old_recipe(path, config, **values):
    """Write a configuration as an earlier version did, with its removed settings at the values given here."""
    saved = asdict(config)
    sections = {"autoencoder", "denoiser", "rollout"} if hasattr(config, "stage") else {"data", "model", "adapter"}
    for name, value in ({name: same for name, (same, _) in FIXED.items()} | DEFAULTS | values).items():
        section, *inner, last = name.split(".")
        if section in sections | {"objective", "train"}:
            at = saved.setdefault(section, {})
            for part in inner:
                at = at.setdefault(part, {})
            at[last] = value
    path.write_text(json.dumps(saved))
    return path


@pytest.mark.parametrize("name", ["stdlib-tiny", "bert-chat", "latent-autoencoder", "latent-rollout"])
def test_a_recipe_of_an_earlier_version_is_read_where_it_sets_nothing_that_was_removed(tmp_path, name):
    recipe = RECIPES[name]()
    path = old_recipe(tmp_path / "recipe.json", recipe, **{"train.keep_checkpoints": 5})
    assert type(recipe).read(path) == replace(recipe, train=replace(recipe.train, max_checkpoints=5))


def test_all_removed_settings_are_refused_in_one_line_that_says_what_to_use(tmp_path):
    given = {"data.chat.eos": "to-block-end", "model.num_layers": 3, "train.max_grad_norm": 0.5}
    path = old_recipe(tmp_path / "recipe.json", RECIPES["stdlib-tiny"](), **given)
    with pytest.raises(ValueError, match="were removed") as refusal:
        RunConfig.read(path)
    message = str(refusal.value)
    assert "\n" not in message
    assert message.count(": ") == 1 + len(given)
    for name, value in given.items():
        assert f"{name} {value!r}: {FIXED[name][1]}" in message


def test_thoughts_have_a_kind_of_their_own_and_no_old_name_is_a_setting(tmp_path):
    recipe = RECIPES["thought-ar"]()
    path = old_recipe(tmp_path / "recipe.json", recipe, **{"data.kind": "thought"})
    assert RunConfig.read(path).data.kind == NEW_VALUES["data.kind", "thought"] == WORDS
    for name in {*FIXED, *IGNORED, *RENAMED}:
        for config in (recipe, RECIPES["latent-rollout"]()):
            at = asdict(config)
            for part in name.split("."):
                at = at.get(part, {}) if isinstance(at, dict) else {}
            assert at == {}, name
