"""The engine: whatever else runs, a served request is what `generate` gives."""

import pytest
from serving_tools import running, send
from tiny import tiny_lm


@pytest.fixture(scope="module", params=["full", "block-causal"])
def lm(request):
    return tiny_lm(block_size=4 if request.param == "block-causal" else None)


def test_served_is_generated(lm):
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7, 8, 9, 10, 11, 12, 13], [4]]
    with running(lm, max_rows=3, chunk=4) as engine:
        engine.warm_up()
        sent = []
        for i, prompt in enumerate(prompts):
            settings = {"max_new_tokens": 8 + 4 * i, "temperature": 0.8 * (i % 2), "num_samples": 1 + i % 3, "seed": i}
            sent.append((prompt, settings, send(engine, lm.prepare([prompt], **settings), id=str(i))))
        for prompt, settings, client in sent:
            expected = lm.generate([prompt], **settings)
            client.wait()
            for index, tokens in enumerate(expected.tokens):
                assert client.tokens(index) == tokens.tolist()
                assert client.last(index).usage.forwards == expected.forwards[index]
                assert client.last(index).usage.completion_tokens == len(tokens)
    assert not engine.is_alive
