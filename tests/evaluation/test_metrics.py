import itertools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from redraft.evaluation.metrics import (
    Perplexity,
    bleu,
    bootstrap,
    calibration,
    calibration_error,
    distinct_n,
    edit_similarity,
    mauve,
    pass_at_k,
    quality,
    repetition,
    self_bleu,
    unigram_entropy,
    vote,
)


class Letters:
    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [3 + ord(letter) % 30 for letter in text]}


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, c, k in [(5, 2, 3), (6, 0, 2), (4, 4, 1), (7, 1, 7)]:
        subsets = list(itertools.combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    with pytest.raises(ValueError, match=r"k=3, 2 samples.*lower k"):
        pass_at_k(2, 1, 3)


def test_entropy_and_repetition_expose_a_loop():
    assert unigram_entropy("abcd") == pytest.approx(math.log(4))
    assert unigram_entropy("aaaa") == unigram_entropy("") == 0
    assert repetition("abcdefgh") == 0
    assert repetition("abababab") == pytest.approx(3 / 5)


def test_distinct_and_self_bleu_expose_texts_that_are_alike():
    assert distinct_n(["ab", "ab"], 1) == 0.5
    assert distinct_n([""], 2) == 0
    same, unlike = [["the", "cat", "sat", "on", "it"]] * 3, [["a", "b", "c", "d", "e"], ["f", "g", "h", "i", "j"]]
    assert self_bleu(same) == pytest.approx(1)
    assert self_bleu(unlike) < 0.2
    assert bleu(["a", "b"], [["a", "b", "c", "d"]]) == pytest.approx(math.exp(-1))
    with pytest.raises(ValueError, match="got 1"):
        self_bleu(["one"])


def test_votes_and_edits():
    assert vote(["b", "a", "a", "b", "c"]) == "b"
    assert edit_similarity("abcd", "abxd") == 0.75
    with pytest.raises(ValueError, match="no answer"):
        vote([])


def test_perplexity_states_its_units():
    text = Perplexity(nats=-20 * math.log(2), standard_error=0.0, num_tokens=10, num_words=5, num_bytes=20)
    assert text.nats_per_token == pytest.approx(2 * math.log(2))
    assert text.bits_per_byte == pytest.approx(1)
    assert text.word_perplexity == pytest.approx(2**4)


def test_the_bootstrap_interval_covers_the_mean_and_shrinks():
    few, many = bootstrap([0.0, 1.0] * 10), bootstrap([0.0, 1.0] * 200)
    assert few.low < 0.5 < few.high
    assert many.high - many.low < few.high - few.low
    assert 0.38 < few.high - few.low < 0.5  # 2 * 1.96 * 0.5 / sqrt(20) = 0.44


def test_a_model_that_is_right_as_often_as_it_says_has_no_calibration_error():
    honest = [(0.9, 1.0)] * 9 + [(0.9, 0.0)] + [(0.2, 1.0)] * 2 + [(0.2, 0.0)] * 8
    assert calibration_error(calibration(honest)) == pytest.approx(0)
    assert [one.count for one in calibration(honest)] == [10, 10]
    boastful = [(1.0, 1.0), (1.0, 0.0)]
    assert calibration_error(calibration(boastful)) == pytest.approx(0.5)


def test_quality_reports_perplexity_and_entropy_together(lm):
    judge = replace(lm, tokenizer=Letters())
    found = quality(["abcdefgh", "", "hgfedcba"], judge, samples=8)
    assert found.unigram_entropy == pytest.approx(math.log(8))
    assert found.judge_nats_per_token > 0
    with pytest.raises(ValueError, match="all 1 are empty"):
        quality([""], judge)


def test_mauve_compares_features_of_the_judge_where_its_package_is_installed(lm, monkeypatch):
    judge = replace(lm, tokenizer=Letters())
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ValueError, match="needs the package mauve-text: pip install"):
        mauve(["abc"], ["abc"], judge)
    asked = []

    def compute(*, p_features, q_features, seed):
        asked.append((p_features, q_features))
        return SimpleNamespace(mauve=0.5)

    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace(compute_mauve=compute))
    assert mauve(["abc", "bcd", ""], ["abc", "xyz"], judge) == 0.5
    (p, q) = asked[0]
    assert p.shape == q.shape == (2, 32)
    assert (p[0] == q[0]).all()
    assert abs(p[1] - q[1]).max() > 1e-3
    with pytest.raises(ValueError, match="sets of texts; got 1 and 2"):
        mauve(["abc", ""], ["abc", "xyz"], judge)
