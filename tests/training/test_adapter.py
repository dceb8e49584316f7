"""LoRA, QLoRA and gradient checkpointing: what is trained, saved, resumed and merged."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import redraft
from redraft.cli import main
from redraft.data.config import DataConfig
from redraft.data.tokenizer import train_tokenizer
from redraft.models.config import AdapterConfig, ModelConfig
from redraft.models.head import chunked_loss
from redraft.training.callbacks import read_log
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.run import run

QUIET = Console(quiet=True)
TEXTS = [f"def function_{i}_{j}(x):\n    return x + {i * j % 7}\n" for i in range(40) for j in range(12)]
IDS = torch.arange(3, 35)[None]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter-corpus")
    for i in range(40):
        (folder / f"module_{i}.py").write_text("\n".join(TEXTS[12 * i : 12 * i + 12]))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter-base")
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=304, **SIZES, max_position_embeddings=64, bos_token_id=None, eos_token_id=1)
    LlamaForCausalLM(shape).save_pretrained(folder / "source")
    train_tokenizer(TEXTS, vocab_size=300).save_pretrained(folder / "source")
    redraft.convert(folder / "source", folder / "base")
    return folder / "base"


@pytest.fixture
def config(base, corpus, tmp_path):
    return RunConfig(
        out=str(tmp_path / "run"),
        data=DataConfig(
            source=str(corpus), seq_len=32, validation_fraction=0.2
        ),
        model=ModelConfig(start=str(base)),
        adapter=AdapterConfig(rank=4, alpha=8, targets="all-linear"),
        train=TrainConfig(
            batch_size=4, max_steps=4, save_every=2, max_validation_windows=8, precision="float32",
            compile="off", learning_rate=1e-2,
        ),
    )  # fmt: skip


def with_train(config, **changes):
    return replace(config, train=replace(config.train, **changes))


def adapter_weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def logged(folder, name):
    return [line[name] for line in read_log(Path(folder) / "log.jsonl") if name in line]


def logits(*arguments, **options):
    return redraft.load(*arguments, device="cpu", **options).logits(IDS)


def test_only_the_adapter_is_trained_and_saved_and_it_loads_by_itself_over_its_base_and_merged(config, base, tmp_path):
    before = load_file(base / "model.safetensors")
    run(config, console=QUIET)
    names = adapter_weights(config.out)
    assert all("lora_" in name for name in names)
    assert any(weight.abs().max() > 1e-3 for name, weight in names.items() if "lora_B" in name)
    assert not list(Path(config.out).rglob("model.safetensors"))
    optimizer = torch.load(Path(config.out) / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(names)
    assert all(torch.equal(before[name], weight) for name, weight in load_file(base / "model.safetensors").items())
    alone, over = logits(config.out), logits(base, adapter=config.out)
    assert torch.equal(alone, over)
    assert (alone - logits(base)).abs().max() > 1e-2
    redraft.convert(config.out, tmp_path / "merged")
    redraft.convert(base, tmp_path / "merged-too", adapter=config.out)
    assert (logits(tmp_path / "merged") - alone).abs().max() < 1e-5
    assert torch.equal(logits(tmp_path / "merged"), logits(tmp_path / "merged-too"))
    assert torch.equal(logits(Path(config.out) / "checkpoint-4"), alone)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # peft keeps the head beside it
def test_an_adapter_trained_on_a_tied_head_merges_to_its_own_logits(config, tmp_path):
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=304, **SIZES, max_position_embeddings=64, eos_token_id=1, tie_word_embeddings=True)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "source")
    train_tokenizer(TEXTS, vocab_size=300).save_pretrained(tmp_path / "source")
    redraft.convert(tmp_path / "source", tmp_path / "base")
    adapter = replace(config.adapter, targets="q_proj,lm_head")
    run(replace(config, model=ModelConfig(start=str(tmp_path / "base")), adapter=adapter), console=QUIET)
    redraft.convert(config.out, tmp_path / "merged")
    laid_over, plain = logits(config.out), logits(tmp_path / "base")
    assert torch.allclose(logits(tmp_path / "merged"), laid_over, atol=1e-4)
    assert not torch.allclose(plain, laid_over, atol=1e-2)


def test_before_the_first_step_the_model_is_its_base(config, base):
    run(with_train(config, max_steps=1, learning_rate=1e-30), console=QUIET)
    assert torch.equal(logits(config.out), logits(base))


def test_an_adapter_carries_what_it_was_trained_for(config, base, tmp_path):
    block = ObjectiveConfig(kind="block", block_size=8)
    run(replace(with_train(config, max_steps=1), objective=block), console=QUIET)
    redraft.convert(config.out, tmp_path / "merged")
    for lm in (redraft.load(config.out), redraft.load(base, adapter=config.out), redraft.load(tmp_path / "merged")):
        assert lm.denoiser.settings.block_size == 8
    assert redraft.load(base).denoiser.settings.block_size is None


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_a_resumed_run_ends_bitwise_equal(config, quantization):
    config = replace(config, model=replace(config.model, quantization=quantization))
    config = with_train(config, ema_decay=0.5)
    run(config, console=QUIET)
    whole = adapter_weights(config.out)
    shutil.rmtree(Path(config.out) / "checkpoint-4")  # as if it had been killed after its second step
    (Path(config.out) / "adapter_model.safetensors").unlink()
    run(config, resume=True, console=QUIET)
    resumed = adapter_weights(config.out)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert logits(config.out).isfinite().all()


@pytest.mark.parametrize(("quantization", "of_gradient", "of_loss"), [("int8", 0.05, 0.01), ("nf4", 0.2, 0.01)])
def test_the_gradients_over_a_quantised_base_are_close_to_those_over_the_base(
    config, quantization, of_gradient, of_loss
):
    run(with_train(config, max_steps=1), console=QUIET)
    small = replace(config, out=config.out + "-small", model=replace(config.model, quantization=quantization))
    run(with_train(small, max_steps=1), console=QUIET)
    assert logged(small.out, "grad_norm") == pytest.approx(logged(config.out, "grad_norm"), rel=of_gradient)
    assert logged(small.out, "loss") == pytest.approx(logged(config.out, "loss"), rel=of_loss)
    assert adapter_weights(small.out).keys() == adapter_weights(config.out).keys()


def test_a_half_precision_run_trains_float32_adapters(config):
    run(with_train(config, max_steps=1, precision="bfloat16"), console=QUIET)
    assert {weight.dtype for weight in adapter_weights(config.out).values()} == {torch.float32}


def test_four_rows_at_once_equal_one_row_four_times(config):
    run(config, console=QUIET)
    split = with_train(replace(config, out=config.out + "-split"), batch_size=1, accumulation=4)
    run(split, console=QUIET)
    assert logged(config.out, "loss") == pytest.approx(logged(split.out, "loss"), abs=1e-5)
    assert logged(config.out, "grad_norm") == pytest.approx(logged(split.out, "grad_norm"), abs=1e-4)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(
    "objective", [ObjectiveConfig(), ObjectiveConfig(kind="block", block_size=8)], ids=["masked", "block"]
)
def test_gradient_checkpointing_changes_nothing(config, rank, objective):
    config = with_train(replace(config, adapter=AdapterConfig(rank=rank), objective=objective), max_steps=2)
    run(config, console=QUIET)
    again = with_train(replace(config, out=config.out + "-again"), gradient_checkpointing=True)
    run(again, console=QUIET)
    for name in ("loss", "grad_norm"):
        assert logged(config.out, name) == pytest.approx(logged(again.out, name), rel=1e-6)
    file = "adapter_model.safetensors" if rank else "model.safetensors"
    a, b = (load_file(Path(folder.out) / file) for folder in (config, again))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_a_frozen_head_gets_no_gradient():
    head = torch.nn.Linear(4, 8).requires_grad_(False)
    hidden = torch.randn(3, 4, requires_grad=True)
    chunked_loss(head, hidden, lambda z, _: z.logsumexp(-1))[0].backward()
    expected = torch.autograd.grad(head(hidden).logsumexp(-1).sum(), hidden)[0]
    assert torch.allclose(hidden.grad, expected)
    assert head.weight.grad is None


def test_auto_finds_the_targets_of_an_encoder(config, tmp_path):
    shape = BertConfig(vocab_size=300, **SIZES, max_position_embeddings=32)
    BertForMaskedLM(shape).save_pretrained(tmp_path / "bert")
    train_tokenizer(TEXTS, vocab_size=300).save_pretrained(tmp_path / "bert")
    redraft.convert(tmp_path / "bert", tmp_path / "start")
    auto = replace(config, model=ModelConfig(start=str(tmp_path / "start")), adapter=AdapterConfig(rank=2))
    run(with_train(auto, max_steps=1), console=QUIET)
    assert {name.split(".")[-3] for name in adapter_weights(config.out)} == {"query", "value"}


def test_the_start_says_how_much_is_trained(config, capsys):
    run(with_train(config, max_steps=1), console=Console(width=200))
    trained = sum(weight.numel() for weight in adapter_weights(config.out).values())
    assert f"trains {trained / 1e6:.2f} M of 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "q_proj,query"}, "got 'query'. Choose among down_proj, gate_proj, .*v_proj, or use all-linear"),
        ({"targets": "roj"}, "adapter.targets names no linear layer of llama; got 'roj'"),
    ],
)
def test_targets_that_match_nothing_are_told_with_the_candidates_before_anything_is_written(config, changes, message):
    with pytest.raises(ValueError, match=message) as told:
        run(replace(config, adapter=replace(config.adapter, **changes)), console=QUIET)
    assert "\n" not in str(told.value)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunConfig(adapter=AdapterConfig(rank=4)), "an adapter needs a model to adapt; got adapter.rank 4"),
        (
            lambda: RunConfig(model=ModelConfig(start="a/b", quantization="int8")),
            "got model.quantization 'int8' without an adapter. Add --adapter.rank 16",
        ),
        (
            lambda: RunConfig(model=ModelConfig(start="a/b", quantization="int4"), adapter=AdapterConfig(rank=4)),
            "model.quantization must be one of 'int8', 'nf4', None; got 'int4'",
        ),
        (lambda: AdapterConfig(rank=-1), "adapter.rank must be at least 0; got -1"),
        (lambda: AdapterConfig(alpha=0), "adapter.alpha must be positive and finite; got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_do_not_fit_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_adapter_without_its_base_and_one_as_a_start_are_told(config, base, tmp_path):
    run(with_train(config, max_steps=1), console=QUIET)
    onward = replace(config, out=str(tmp_path / "onward"), model=ModelConfig(start=config.out))
    with pytest.raises(ValueError, match=r"is an adapter. Merge it: redraft convert .*run OUT"):
        run(onward, console=QUIET)
    file = Path(config.out) / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved["base_model_name_or_path"] == str(base)
    file.write_text(json.dumps(saved | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"no model at .*gone: the folder does not exist"):
        redraft.load(config.out)
    file.write_text(json.dumps(saved | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model. Load the base, with adapter="):
        redraft.load(config.out)


def test_the_command_line_takes_it(config, tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(with_train(config, max_steps=1))))
    flags = ["--adapter.rank", "2", "--adapter.targets", "q_proj", "--train.gradient-checkpointing"]
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(tmp_path / "recipe.json"), "--model.quantization", "int8", *flags])
    assert not exit_.value.code
    assert len(adapter_weights(config.out)) == 4
