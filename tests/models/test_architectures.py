"""The compatibility table: every decoder-only architecture of the installed transformers, built and measured."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from architectures import Row, architectures, measure, table


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma2", "gpt2", "deepseek_v3"])
def test_common_architectures_work_fully(model_type):
    row = measure(model_type)
    assert row.works, row.reason


@pytest.mark.parametrize("model_type", ["mamba", "lfm2", "jamba", "rwkv"])
def test_recurrent_and_convolutional_ones_are_refused_with_the_reason(model_type):
    row = measure(model_type)
    assert not row.bidirectional
    assert "recurrent, convolutional" in row.reason


def test_the_table_counts():
    rows = [Row(model_type="a", bidirectional=True, block_causal=True, cached=True), Row(model_type="b", reason="x|y")]
    text = table(rows)
    assert "| a | yes | yes | yes |  |" in text
    assert "| b | no | no | no | x/y |" in text
    assert "1 of 2 architectures work fully" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_at_least_ninety_architectures_work_fully_and_none_crashes():
    rows = [measure(model_type) for model_type in architectures()]
    assert sum(row.works for row in rows) >= 90
    assert all(row.works or row.reason for row in rows)
