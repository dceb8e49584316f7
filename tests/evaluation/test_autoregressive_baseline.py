"""The autoregressive baseline: a causal model as it stands, through the same evaluation."""

import math

import pytest
import torch

import redraft
from redraft.evaluation.run import Conditions, Store, run_task
from redraft.evaluation.tasks import TaskOptions, make_task
from redraft.likelihood.config import LikelihoodConfig


@pytest.fixture(scope="module")
def source(tmp_path_factory, model_folder):
    """A plain causal model with a tokenizer, as others publish them."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("ar") / "source"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.4, eos_token_id=1, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def baseline(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ar") / "baseline"
    made = redraft.convert(source, folder, autoregressive=True)
    assert made.settings.is_autoregressive
    return redraft.load(folder)


def test_a_baseline_has_the_likelihood_that_plain_transformers_computes(source, baseline):
    from transformers import AutoModelForCausalLM

    context, continuation = baseline.encode_pair("the question is", " what it says")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(source)(torch.cat([context, continuation])[None]).logits[0]
    logits[:, baseline.denoiser.settings.mask_token_id] = -torch.inf  # it stands in no text
    expected = logits.log_softmax(-1)[len(context) - 1 : -1].gather(1, continuation[:, None]).sum()
    found = baseline.loglikelihood("the question is", " what it says")
    assert found.nats == pytest.approx(float(expected), abs=1e-3)
    assert found.standard_error == 0


def test_a_baseline_generates_what_plain_transformers_does(source, baseline):
    from transformers import AutoModelForCausalLM

    prompt = baseline.encode("who is it")
    model = AutoModelForCausalLM.from_pretrained(source)
    tokens = prompt
    with torch.no_grad():
        for _ in range(8):
            logits = model(tokens[None]).logits[0, -1]
            logits[baseline.denoiser.settings.mask_token_id] = -torch.inf
            tokens = torch.cat([tokens, logits.argmax()[None]])
    out = baseline.generate([prompt], max_new_tokens=8, temperature=0.0, stop=None)
    assert out.tokens[0].tolist() == tokens[len(prompt) :].tolist()


def test_a_baseline_runs_through_the_offline_tasks(baseline, tmp_path):
    (tmp_path / "text.md").write_text("some words of a text\n" * 3)
    task = make_task(f"perplexity:{tmp_path / 'text.md'}", TaskOptions())
    options = Conditions(likelihood=LikelihoodConfig(num_samples=4))
    (record,) = run_task(baseline, task, Store(folder=tmp_path), options)
    assert record["standard_error"] == 0
    assert math.isfinite(record["scores"]["bits_per_byte"])


def test_what_is_not_autoregressive_is_no_baseline(model_folder, tmp_path):
    with pytest.raises(ValueError, match="is not autoregressive .*leave autoregressive out"):
        redraft.convert(model_folder, tmp_path / "out", autoregressive=True)
