"""Several threads on one loaded model: each gets the tokens it gets alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import tiny_lm

import redraft


def run_together(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize("block_size", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_threads_on_one_model_get_the_tokens_they_get_alone(block_size):
    lm = tiny_lm(block_size=block_size)
    prompts = [[5 + i] * (1 + 3 * i) for i in range(4)]  # of unlike lengths: their forwards have unlike shapes
    calls = [lambda p=p: lm.generate(p, max_new_tokens=12, temperature=0.8).tokens[0].tolist() for p in prompts]
    alone = [call() for call in calls]
    for _ in range(5):
        assert run_together(calls) == alone


def test_likelihoods_infilling_logits_and_texts_run_beside_each_other():
    lm = tiny_lm()
    ids = torch.arange(3, 12)[None]
    calls = [
        lambda: lm.loglikelihood([5, 6, 7], [8, 9]).nats,
        lambda: lm.infill([5, 2, 2, 6], steps=2).sequences[0].tolist(),
        lambda: lm.logits(ids).sum().item(),
        lambda: lm.generate([5, 6], max_new_tokens=8).tokens[0].tolist(),
    ]
    alone = [call() for call in calls]
    for _ in range(5):
        assert run_together(calls) == alone


def test_threads_share_a_compiled_constraint(text_lm):
    constraint = redraft.Regex(r"[a-f]{2,6}(-[0-9]{2}){1,3}")
    calls = [
        lambda i=i: text_lm.generate(f"id {i}: ", constraint=constraint, max_new_tokens=20, steps=10).texts[0]
        for i in range(4)
    ]
    together = run_together(calls)  # the first use compiles it
    assert together == [call() for call in calls]


def test_an_error_in_one_thread_leaves_the_model_to_the_others():
    lm = tiny_lm()
    expected = lm.generate([5, 6], max_new_tokens=8).tokens[0].tolist()

    def fail(logits, canvas, where):
        raise RuntimeError("a guide of one's own")

    def failing():
        with pytest.raises(RuntimeError, match="of one's own"):
            lm.generate([5, 6], max_new_tokens=8, guides=[fail])

    run_together([failing, failing])
    assert lm.generate([5, 6], max_new_tokens=8).tokens[0].tolist() == expected
