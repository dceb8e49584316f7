"""A gated adapter acts on open tokens alone: the base's text stays what it is, and its drafts are trained."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_lm
from transformers import AutoModelForCausalLM

import redraft
from redraft.data.config import DataConfig
from redraft.likelihood.problem import CleanRows, NoiseKey, problem_loss
from redraft.models.config import AdapterConfig, ModelConfig
from redraft.models.gate import PEFT_TYPE, fingerprint
from redraft.models.query import Query
from redraft.training.adapter import add_adapter, enable_checkpointing
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig
from redraft.training.run import run

DRAFTS = ObjectiveConfig(kind="block", block_size=4, context="causal", within="causal", t_min=1.0, distill=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory, model_folder):
    """An autoregressive model in which a causal context was declared, with a tokenizer."""
    folder = tmp_path_factory.mktemp("gate") / "base"
    tokenizer = redraft.load(model_folder).tokenizer
    model = tiny_lm(
        vocab_size=len(tokenizer), block_size=4, within="causal", shift_logits=True, dtype=torch.float32, scale=3.0
    ).model
    model.config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("run")
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(8):
        (corpus / f"{i}.py").write_text("\n".join(f"def f_{i}_{j}(x):\n    return x + {i * j % 7}\n" for j in range(9)))
    return RunConfig(
        out=str(folder / "run"),
        data=DataConfig(source=str(corpus), seq_len=32, validation_fraction=0.2),
        model=ModelConfig(start=str(base)),
        adapter=AdapterConfig(rank=4, gate=True, targets="all-linear"),
        objective=DRAFTS,
        train=TrainConfig(
            batch_size=4, max_steps=6, save_every=3, precision="float32", compile="off", learning_rate=1e-2,
            max_validation_windows=4,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config):
    return run(config, console=Console(quiet=True)).folder


def gated(lm, seed=0):
    """The model with a gated adapter of random weights."""
    add_adapter(lm.model, AdapterConfig(rank=4, gate=True, targets="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in lm.model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(lm.model.dtype)
    return lm


def test_the_adapter_acts_on_open_tokens_alone():
    plain = tiny_lm(block_size=4, within="causal", shift_logits=True)
    lm = gated(tiny_lm(block_size=4, within="causal", shift_logits=True))
    ids = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    query = Query.everywhere(ids, committed=torch.tensor([4, 8]))
    before, after = (one.denoiser(query).view(2, 12, -1) for one in (plain, lm))
    for row, committed in enumerate((4, 8)):  # a position is predicted by its left neighbour
        assert torch.equal(before[row, : committed + 1], after[row, : committed + 1])
        assert (before[row, committed + 1 :] - after[row, committed + 1 :]).abs().amax(dim=-1).min() > 1e-3
    none = Query.everywhere(ids)
    assert torch.equal(plain.denoiser(none), lm.denoiser(none))


@pytest.mark.parametrize("preset", ["speculate", "speculate-ahead"])
def test_a_gate_changes_drafts_and_no_text(preset):
    plain = tiny_lm(block_size=5, within="causal", shift_logits=True)
    lm = gated(tiny_lm(block_size=5, within="causal", shift_logits=True))
    chosen = {"max_new_tokens": 24, "temperature": 0.5, "stop": None}
    prompts = [[5, 6, 7], [8], []]
    expected = plain.generate(prompts, preset="ar", **chosen)
    ar = lm.generate(prompts, preset="ar", **chosen)
    assert [row.tolist() for row in ar.tokens] == [row.tolist() for row in expected.tokens]
    for other in (plain, lm):
        out = other.generate(prompts, preset=preset, **chosen)
        assert [row.tolist() for row in out.tokens] == [row.tolist() for row in expected.tokens]
    assert plain.generate(prompts, preset=preset, **chosen).accepted != out.accepted
    assert not torch.equal(  # blocks are drafted with the adapter in other presets too
        plain.generate(prompts, preset="sdar", max_new_tokens=24, stop=None).tokens[0],
        lm.generate(prompts, preset="sdar", max_new_tokens=24, stop=None).tokens[0],
    )


def test_training_teaches_the_drafts_and_keeps_the_text(trained, base):
    lm, plain = redraft.load(trained), redraft.load(base)
    prompts = ["def f_1_2(x):\n", "    return"]
    expected = plain.generate(prompts, preset="ar", max_new_tokens=24)
    assert lm.generate(prompts, preset="ar", max_new_tokens=24).texts == expected.texts
    assert lm.generate(prompts, preset="speculate", max_new_tokens=24).texts == expected.texts
    first, last = (json.loads(line) for line in _losses(trained))
    assert last["loss"] < first["loss"]
    assert lm.loglikelihood("def f", "_1_2(x)").nats == pytest.approx(plain.loglikelihood("def f", "_1_2(x)").nats)


def _losses(folder):
    lines = [line for line in (folder / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    return lines[0], lines[-1]


def test_a_run_resumes_bitwise(config, trained, tmp_path):
    other = replace(config, out=str(tmp_path / "run"))
    run(replace(other, train=replace(config.train, max_steps=6)), console=Console(quiet=True))
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    (tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors").unlink()
    run(other, resume=True, console=Console(quiet=True))
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_gradients_with_activation_checkpointing_equal_those_without(config, base):
    found = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        lm = gated(redraft.load(base, dtype=torch.float64))
        lm.model.train()
        if is_checkpointed:
            enable_checkpointing(lm.model)
        ids = torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(1))
        objective = DRAFTS.build(mask_token_id=2, vocab_size=97)
        rows = CleanRows(x_0=ids, segment_ids=torch.ones_like(ids), is_target=torch.ones_like(ids).bool())
        key = NoiseKey(seed=0, step=0, rows=torch.arange(2), total_rows=2)
        problem_loss(lm.denoiser, objective.problem(rows, key), num_rows=2)[0].backward()
        found.append({n: p.grad for n, p in lm.model.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    assert any("lora_A" in name for name in found[0])
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[1][name], gradient, atol=1e-12, rtol=0)


def test_only_redraft_loads_it_and_only_over_its_base(trained, base, tmp_path):
    saved = json.loads((trained / "adapter_config.json").read_text())
    assert saved["peft_type"] == PEFT_TYPE
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained)
    with pytest.raises(ValueError, match="has a gate: merged, it would act on all tokens"):
        redraft.convert(trained, tmp_path / "merged")
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.get_input_embeddings().weight[:, 0] += 1
    other.save_pretrained(tmp_path / "other")
    redraft.load(base).tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained over other weights"):
        redraft.load(tmp_path / "other", adapter=trained)


def test_a_fingerprint_is_of_the_weights_not_of_their_precision(base):
    assert fingerprint(redraft.load(base).model) == fingerprint(redraft.load(base, dtype=torch.bfloat16).model)


def test_a_gate_needs_a_model_with_text_of_its_own(config, model_folder, tmp_path):
    wrong = replace(config, out=str(tmp_path / "run"), model=ModelConfig(start=str(model_folder)))
    wrong = replace(wrong, objective=ObjectiveConfig())
    with pytest.raises(ValueError, match="adapter.gate needs a causal context"):
        run(wrong, console=Console(quiet=True))
    with pytest.raises(ValueError, match="adapter.gate needs an adapter; got adapter.rank 0"):
        AdapterConfig(gate=True)
    lm = tiny_lm(block_size=4, within="causal", shift_logits=True)
    lm.model.model.embed_out = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match="acts inside of decoder layers; model.embed_out lies outside"):
        gated(lm)
    with pytest.raises(ValueError, match="has no self_attn layers that are told"):
        gated(tiny_lm(architecture="modernbert"))
