"""Our loop behind transformers' own `generate`: what carries over is honoured, the rest is refused."""

import pytest
import torch
from tiny import tiny_lm

import redraft

IDS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
ROWS = [[5, 6], [7, 8, 9, 10]]


@pytest.fixture
def lm():
    return tiny_lm()


def generate(lm, **settings):
    settings = {"eos_token_id": 1, "pad_token_id": 1, "max_new_tokens": 8} | settings
    return lm.model.generate(IDS, attention_mask=MASK, custom_generate=redraft.custom_generate, **settings)[:, 4:]


def is_same(new, expected):
    return all(
        torch.equal(row[: len(tokens)], tokens) and bool((row[len(tokens) :] == 1).all())
        for row, tokens in zip(new, expected, strict=True)
    )


def test_generate_of_transformers_gives_the_tokens_of_our_loop_at_every_use(lm):
    expected = lm.generate(ROWS, max_new_tokens=8, steps=4).tokens
    for _ in range(2):
        assert is_same(generate(lm, do_sample=False, steps=4), expected)


def test_a_streamer_is_refused_as_it_would_get_nothing(lm):
    config = lm.model.generation_config
    with pytest.raises(ValueError, match="a streamer does not carry over to diffusion; use lm.generate"):
        redraft.custom_generate(lm.model, IDS, generation_config=config, streamer=object())


@pytest.mark.parametrize(
    "saved", [{"preset": "llada-random", "temperature": 1.5}, {"steps": 2}, {"preset": "eb", "entropy_bound": 0.4}]
)
def test_settings_that_the_checkpoint_carries_hold_where_nothing_is_given(lm, saved):
    lm.model.config.generation = saved
    expected = lm.generate(ROWS, max_new_tokens=8).tokens
    assert is_same(generate(lm), expected)
    without = tiny_lm().generate(ROWS, max_new_tokens=8).tokens
    assert not is_same(without, expected)


def test_settings_that_are_given_go_before_those_of_the_checkpoint(lm):
    lm.model.config.generation = {"steps": 2, "temperature": 1.5}
    assert is_same(
        generate(lm, preset="llada", steps=4), lm.generate(ROWS, preset="llada", max_new_tokens=8, steps=4).tokens
    )
    assert is_same(generate(lm, steps=4), lm.generate(ROWS, max_new_tokens=8, steps=4).tokens)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_beams": 2}, "num_beams does not carry over to diffusion; got 2. Leave it out."),
        ({"min_new_tokens": 3}, "MinLengthLogitsProcessor counts the tokens before the next one"),
        ({"min_length": 8}, "MinLengthLogitsProcessor counts the tokens before the next one"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor counts the tokens before"),
        ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor counts the tokens before"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate does not carry over"),
        ({"max_time": 1.0}, "MaxTimeCriteria does not carry over"),
    ],
)
def test_settings_made_for_text_that_grows_from_the_left_are_refused(lm, setting, message):
    with pytest.raises(ValueError, match=message):
        generate(lm, **setting)


def test_a_text_ends_at_every_listed_end(lm):
    whole = generate(lm, eos_token_id=[1])[0]
    ends = [1, int(whole[3])]
    new = generate(lm, eos_token_id=ends)[0].tolist()
    first = next(i for i, token in enumerate(whole.tolist()) if token in ends)
    assert new[: first + 1] == whole[: first + 1].tolist()
    assert set(new[first + 1 :]) <= {1}  # padding


def test_several_sequences_of_one_prompt_are_drawn_apart(lm):
    new = generate(lm, num_return_sequences=2, do_sample=True)
    assert len(new) == 4
    assert not torch.equal(new[0], new[1])


@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.5}, {"suppress_tokens": [7, 8]}])
def test_processors_that_need_no_order_act_on_padded_batches_too(lm, setting):
    together = generate(lm, **setting)
    alone = lm.model.generate(
        IDS[:1, 2:],
        custom_generate=redraft.custom_generate,
        eos_token_id=1,
        pad_token_id=1,
        max_new_tokens=8,
        **setting,
    )[0, 2:]
    assert torch.equal(together[0, : len(alone)], alone)
    assert not torch.equal(together, generate(lm)[:, : together.shape[1]])


def test_bad_words_and_biases_of_single_tokens_act_and_those_of_several_are_refused(lm):
    likeliest = int(generate(lm)[0].mode().values)
    for setting in ({"bad_words_ids": [[likeliest]]}, {"sequence_bias": {(likeliest,): -1e4}}):
        assert likeliest not in generate(lm, **setting)[0]
    for setting in ({"bad_words_ids": [[likeliest, 7]]}, {"sequence_bias": {(likeliest, 7): -1e4}}):
        with pytest.raises(ValueError, match="counts the tokens before the next one"):
            generate(lm, **setting)


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}])
def test_cuts_leave_a_token_where_the_mask_is_the_likeliest(lm, setting):
    with torch.no_grad():
        lm.model.lm_head.weight[2] *= 50
    new = generate(lm, do_sample=True, **setting)
    assert (new != 2).all()
    greedy = lm.generate(ROWS, max_new_tokens=8).tokens
    if "top_k" in setting:
        assert is_same(new, greedy)
