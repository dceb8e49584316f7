import itertools
import math

import pytest

from redraft.evaluation.metrics import (
    bootstrap,
    calibration,
    calibration_error,
    pass_at_k,
    ratio_score,
    vote,
)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, c, k in [(5, 2, 3), (6, 0, 2), (4, 4, 1), (7, 1, 7)]:
        subsets = list(itertools.combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    with pytest.raises(ValueError, match=r"k=3, 2 samples.*lower k"):
        pass_at_k(2, 1, 3)


def test_votes():
    assert vote(["b", "a", "a", "b", "c"]) == "b"
    with pytest.raises(ValueError, match="no answers to choose from"):
        vote([])


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


def test_texts_of_unequal_length_are_scored_together_in_their_units():
    pairs = [(-2 * math.log(2), 1), (-6 * math.log(2), 3)]
    assert ratio_score("bits_per_byte", pairs).mean == pytest.approx(2)
    assert ratio_score("nats_per_token", pairs).mean == pytest.approx(2 * math.log(2))
    spread = ratio_score("word_perplexity", [(-1.0, 1), (-3.0, 1)] * 20)
    assert spread.mean == pytest.approx(math.exp(2))
    assert spread.low < spread.mean < spread.high
