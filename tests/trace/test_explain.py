"""Explaining a generation: what is watched changes nothing, adds up, and survives in the page."""

import base64
import json
import re

import pytest
import torch
from tiny import tiny_lm

from redraft.cli import infill, sample
from redraft.trace.explain import Watcher, _rank_correlation, explain
from redraft.trace.record import Event, RowTrace


@pytest.fixture
def watched(lm):
    watcher = Watcher(mask_token_id=lm.denoiser.settings.mask_token_id, top_k=3)
    out = lm.generate([[5, 6, 7]], max_new_tokens=8, steps=8, trace=True, guides=[watcher])
    return lm, watcher, out


def test_watching_changes_no_token(watched):
    lm, _, out = watched
    plain = lm.generate([[5, 6, 7]], max_new_tokens=8, steps=8)
    assert torch.equal(plain.tokens[0], out.tokens[0])
    sampled = {"max_new_tokens": 8, "steps": 4, "temperature": 1.0, "seed": 3, "cfg_scale": 0.5}
    watcher = Watcher(mask_token_id=lm.denoiser.settings.mask_token_id)
    seen = lm.generate([[5, 6, 7]], **sampled, guides=[watcher])
    assert torch.equal(lm.generate([[5, 6, 7]], **sampled).tokens[0], seen.tokens[0])


def test_entropy_and_alternatives_are_those_of_the_logits(watched):
    lm, watcher, out = watched
    mask = lm.denoiser.settings.mask_token_id
    canvas = torch.tensor([[5, 6, 7, *[mask] * 8]])
    logits = lm.logits(canvas)[0, 3:]
    logits[:, mask] = -torch.inf
    p = logits.softmax(-1)
    where, entropy, _, top = watcher.steps[0]
    assert where.tolist() == list(range(3, 11))
    assert torch.allclose(entropy, torch.special.entr(p).sum(-1), atol=1e-4)
    assert torch.allclose(top, p.topk(3).values, atol=1e-4)
    assert [len(step[0]) for step in watcher.steps] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert len(watcher.steps) == out.trace[0].num_steps


def test_the_page_holds_what_was_watched_in_bytes(watched):
    _, watcher, _ = watched
    page = watcher.data(num_positions=11, text_of=str)
    heat = torch.frombuffer(bytearray(base64.b64decode(page["entropy"])), dtype=torch.uint8).view(8, 11)
    assert (heat[:, :3] == 255).all()
    assert (heat[0, 3:] < 255).all()
    assert (heat[-1] < 255).sum() == 1
    exact = watcher.steps[0][1]
    assert torch.allclose(heat[0, 3:] / 254 * page["max_entropy"], exact, atol=page["max_entropy"] / 254)
    ids = torch.frombuffer(bytearray(base64.b64decode(page["ids"])), dtype=torch.int32).view(8, 11, 3)
    assert torch.equal(ids[0, 3:].long(), watcher.steps[0][2])
    assert {str(i) for i in ids[0, 3:].flatten().tolist()} <= set(page["texts"]) | {"0"}


def test_the_alternatives_of_a_long_generation_are_thinned_and_its_entropy_is_not(monkeypatch):
    monkeypatch.setattr("redraft.trace.explain.MAX_CELLS", 100)
    watcher = Watcher(mask_token_id=0, top_k=2)
    where = torch.arange(10)
    row = (where, torch.rand(10), torch.randint(9, (10, 2)), torch.rand(10, 2))
    watcher.steps = [row] * 40
    page = watcher.data(num_positions=10, text_of=str)
    assert page["stride"] == 4
    assert len(base64.b64decode(page["entropy"])) == 400
    assert len(base64.b64decode(page["probabilities"])) == 10 * 10 * 2


def test_a_summary_counts_order_confidence_and_revisions():
    def event(step, position, confidence, kind="commit"):
        return Event(step=step, position=position, token_id=4, confidence=confidence, kind=kind)

    events = [event(0, 1, 0.9), event(1, 2, 0.5), event(2, 2, 0.0, "reopen"), event(2, 3, 0.7), event(3, 2, 0.3)]
    trace = RowTrace(
        token_ids=[9, 4, 4, 4], is_given=[True, *[False] * 3], is_noise=[False] * 4, num_steps=4, events=events
    )
    watcher = Watcher(mask_token_id=0)
    none = torch.zeros(0, 1)
    watcher.steps = [(torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]), none, none)] * 4
    assert explain(trace, watcher, text_of=str) == [
        "3 tokens in 4 steps; order: +0.50 (+1 is reading order)",  # steps 0, 3, 2
        "mean confidence 63.3 %; least confident: '4' 30 % (step 4), '4' 70 % (step 3), '4' 90 % (step 1)",
        "0 revised, 1 reopened",
        "mean entropy of an open position in each quarter of the steps: 2.00, 2.00, 2.00, 2.00 nats",
        "largest entropy summed over the steps: '4' 12.0 nats, '4' 8.0 nats, '4' 4.0 nats",
    ]
    with pytest.raises(ValueError, match="nothing was decided"):
        explain(RowTrace(token_ids=[], is_given=[], is_noise=[], num_steps=0, events=[]), watcher, text_of=str)


def test_positions_decided_in_one_step_share_their_mean_rank():
    assert _rank_correlation(torch.tensor([0.0, 0.0, 1.0, 2.0])) == pytest.approx(0.9486833)  # Spearman's, by hand
    assert _rank_correlation(torch.tensor([2.0, 1.0, 1.0, 0.0])) == pytest.approx(-0.9486833)


def test_a_trace_counts_the_steps_of_its_row():
    lm = tiny_lm()
    prompts = [[5, 6], [7, 8, 9]]
    traces = lm.generate(prompts, max_new_tokens=8, steps=4, block_size=4, trace=True).trace
    for prompt, trace in zip(prompts, traces, strict=True):
        assert trace.num_steps == len(list(lm.stream(prompt, max_new_tokens=8, steps=4, block_size=4)))


@pytest.mark.parametrize("padding", [0, 1, 2, 5])
def test_a_trace_ends_where_the_padding_of_its_batch_begins(padding):
    lm = tiny_lm()
    alone, beside = [5, 6], [7] * (2 + padding)
    trace = lm.generate([alone, beside], max_new_tokens=4, stop=None, trace=True).trace[0]
    assert trace.is_given == [True, True, False, False, False, False]
    assert len(trace.token_ids) == len(trace.is_noise) == 6


def test_the_command_writes_a_page_and_sums_up(model_folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    flags = ["--explain", str(out)]
    assert sample.main([str(model_folder), "the ", *flags, "--max-new-tokens", "6", "--steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"6 tokens in 3 steps; order: [+-]\d\.\d\d", printed)
    assert "mean entropy of an open position in each quarter of the steps" in printed
    data = json.loads(re.search(r'<script id="trace" type="application/json">(.*?)</script>', out.read_text(), re.S)[1])
    watched = data["rows"][0]["watched"]
    assert len(base64.b64decode(watched["entropy"])) == 3 * len(data["rows"][0]["positions"])
    assert infill.main([str(model_folder), "a [MASK:4] b", *flags]) == 0
    assert "4 tokens in 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--explain", "page.html"], "--explain takes one text; got 2"),
        (["a", "--explain", "page.html", "--num-samples", "2"], "--explain takes one text; got 2"),
        (["a", "--explain", "/nowhere/page.html"], "cannot write /nowhere/page.html"),
        (["a", "--explain", "page.json"], "cannot write page.json: its name must end in .html"),
        (["a", "--preset", "llaada"], "Did you mean 'llada'"),
    ],
)
def test_bad_input_is_one_clear_error(model_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample.main([str(model_folder), *arguments])
