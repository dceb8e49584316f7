"""Recipes: what is published stands in them, and each runs at a tiny scale without a network."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import redraft
from redraft.cli.train import main
from redraft.data.config import DataConfig
from redraft.data.prepare import prepare
from redraft.data.sources import read_documents
from redraft.models.config import ModelConfig
from redraft.recipes import RECIPES
from redraft.recipes.smoke import smoke
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.run import run
from redraft.training.start import load_start

QUIET = Console(quiet=True)
DISCRETE = [name for name in RECIPES if not name.startswith("latent")]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", DISCRETE)
def test_every_recipe_runs_as_a_smoke_test_with_its_own_objective(name):
    recipe = RECIPES[name]()
    assert main([name, "--smoke"]) == 0
    saved = RunConfig.read(next(iter(Path().glob("runs/*-smoke/recipe.json"))))
    assert saved.objective == recipe.objective
    assert saved.train.max_steps == 3
    assert (saved.train.decay, saved.train.ema_decay) == (recipe.train.decay, recipe.train.ema_decay)
    assert saved.data.chat.batching == recipe.data.chat.batching
    assert saved.data.random_length == recipe.data.random_length
    lm = redraft.load(saved.out, device="cpu")
    assert lm.denoiser.settings.block_size == (1 if recipe.objective.kind == "ar" else recipe.objective.block_size)
    if ":" not in recipe.data.kind:  # whose rows bring a sampler
        assert lm.saved_sampling == {"preset": "llada-random", "temperature": 0.9}
        assert (lm.sampling_config().temperature, lm.sampling_config(preset="llada").temperature) == (0.9, None)


def test_a_run_with_a_start_keeps_the_sampler_of_its_start():
    assert main(["stdlib-tiny", "--smoke", "--out", "first"]) == 0
    for saved in ({"preset": "dream-margin", "top_k": 5}, {}):
        config = json.loads(Path("first/config.json").read_text()) | {"generation": saved}
        Path("first/config.json").write_text(json.dumps(config))
        out = f"second-{len(saved)}"
        assert main(["stdlib-tiny", "--smoke", "--model.start", "first", "--out", out]) == 0
        assert redraft.load(out, device="cpu").saved_sampling == saved


def test_a_smoke_test_takes_flags_and_is_in_the_help(capsys):
    assert main(["stdlib-tiny", "--smoke", "--train.max-steps", "1", "--out", "one"]) == 0
    assert main(["--help"]) == 0
    assert "--smoke" in capsys.readouterr().out


@pytest.mark.slow
def test_latent_stages_run_as_smoke_tests_one_after_the_other():
    for name in ("latent-autoencoder", "latent-denoiser", "latent-rollout"):
        assert main([name, "--smoke"]) == 0


def test_a_smoke_test_writes_nothing_outside_of_its_run_and_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)  # it is looked up once
    (tmp_path / "temporary").mkdir()
    data = smoke(RECIPES["llada-sft"]()).data
    assert len(list(read_documents(data.source, kind="chat"))) == 64
    assert not any((tmp_path / "temporary").iterdir())


def test_epochs_become_steps_of_the_data(tmp_path):
    config = smoke(RECIPES["llada-sft"]())
    config = replace(config, train=replace(config.train, epochs=1.5, max_steps=1000, batch_size=4))
    outcome = run(config, console=QUIET)
    windows = sum(1 for _ in prepare(config.data).train)
    assert outcome.steps == -(-3 * (windows // 4) // 2)


def test_epochs_of_a_stream_are_refused(tmp_path):
    tiny = RECIPES["stdlib-tiny"]()
    assert run(smoke(tiny), console=QUIET).steps == 3
    data = DataConfig(
        seq_len=64, max_documents=10, validation_fraction=0.2, streaming=True, tokenizer="runs/stdlib-tiny-smoke"
    )
    with pytest.raises(ValueError, match=r"train\.epochs needs the length of the data.*stream"):
        run(replace(tiny, data=data, train=TrainConfig(epochs=1)), console=QUIET)


@pytest.mark.parametrize("epochs", [0, -1])
def test_epochs_must_be_positive(epochs):
    with pytest.raises(ValueError, match=r"train\.epochs must be positive and finite; got"):
        TrainConfig(epochs=epochs)


def test_steps_beside_the_epochs_of_a_recipe_are_refused_and_taken_without_them(capsys):
    with pytest.raises(ValueError, match=r"train\.epochs 5 sets .*max_steps 100 too\. Add --train\.epochs"):
        main(["llada-sft", "--train.max-steps", "100"])
    assert not Path("runs").exists()
    steps = ["--smoke", "--train.max-steps", "2", "--train.save-every", "2"]
    assert main(["llada-sft", *steps, "--train.epochs", "None"]) == 0
    assert Path("runs/llada-sft-smoke/checkpoint-2").exists()


def test_a_block_causal_start_is_not_trained_with_full_attention(tmp_path):
    assert main(["bd3lm-owt", "--smoke", "--out", "blocks"]) == 0
    start = ModelConfig(start="blocks")
    data = DataConfig(seq_len=64)
    with pytest.raises(ValueError, match="attends in blocks of 16, which kind masked does not train"):
        load_start(RunConfig(data=data, model=start))
    again = ObjectiveConfig(kind="block", block_size=8)
    assert load_start(RunConfig(data=data, model=start, objective=again)) is not None


@pytest.mark.parametrize(
    ("name", "rate", "rows", "seq_len", "length", "exclude_mask"),
    [
        ("llada-sft", 2e-5, 4, 1024, 5, False),
        ("dream-sft", 2e-5, 4, 1024, 5, False),
        ("a2d-mdlm", 1e-4, 32, 1024, 10, False),
        ("a2d-bd3lm", 1e-4, 32, 512, 10, False),
        ("bert-chat", 1e-4, 48, 1024, 10, False),
        ("mdlm-owt", 3e-4, 512, 1024, 1_000_000, True),
        ("bd3lm-owt", 3e-4, 512, 1024, 1_000_000, True),
        ("llada-pretrain", 1e-4, 16, 1024, 100_000, False),
    ],
)
def test_the_published_numbers(name, rate, rows, seq_len, length, exclude_mask):
    recipe = RECIPES[name]()
    train = recipe.train
    found = (train.learning_rate, train.batch_size * train.accumulation, recipe.data.seq_len)
    assert found == (rate, rows, seq_len)
    assert (train.epochs or train.max_steps) == length
    assert recipe.objective.exclude_mask == exclude_mask


def test_the_published_numbers_of_one_recipe_alone():
    dream, pretraining, owt = (RECIPES[name]() for name in ("dream-sft", "llada-pretrain", "mdlm-owt"))
    assert dream.objective.cart == 0.3
    assert RECIPES["a2d-bd3lm"]().objective.block_size == 32
    assert pretraining.data.random_length == 0.01
    assert owt.train.warmup * owt.train.max_steps == 2500


def test_settings_that_earlier_versions_saved_are_read_or_refused_with_what_replaces_them(tmp_path):
    config = RECIPES["stdlib-tiny"]()
    config.save(tmp_path)
    saved = json.loads((tmp_path / "recipe.json").read_text())
    saved["train"]["keep_checkpoints"] = saved["train"].pop("max_checkpoints")
    saved["train"] |= {"log_every": 7, "max_grad_norm": 1.0, "report_to": ["tensorboard"]}
    saved["data"]["thought"] = {"form": "written", "pad_prompt": False, "fill": False}
    saved["model"]["hidden_size"] = None
    (tmp_path / "recipe.json").write_text(json.dumps(saved))
    assert RunConfig.read(tmp_path / "recipe.json") == config
    saved["model"] |= {"hidden_size": 64, "num_layers": 2}
    (tmp_path / "recipe.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"removed.*model.hidden_size: it is part of model.size.*model.num_layers"):
        RunConfig.read(tmp_path / "recipe.json")
