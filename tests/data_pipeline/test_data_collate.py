import functools
import operator

import pytest
import torch
from beartype import beartype
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from redraft.data.collate import collate

checked = jaxtyped(typechecker=beartype)(collate)
rows_of_tokens = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=5)


@given(rows_of_tokens, st.sampled_from([list, torch.tensor]))
def test_ragged_rows_are_padded_right_and_padding_is_segment_0(rows, kind):
    batch = checked([{"input_ids": kind(row), "segment_ids": kind([1] * len(row))} for row in rows], pad_token_id=7)
    assert batch["input_ids"].dtype == batch["segment_ids"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["segment_ids"].shape == (len(rows), max(map(len, rows)))
    is_token = batch["segment_ids"] > 0
    assert is_token.sum(1).tolist() == [len(row) for row in rows]
    assert batch["input_ids"][is_token].tolist() == functools.reduce(operator.iadd, rows, [])
    assert (batch["input_ids"][~is_token] == 7).all()


def test_no_rows_and_rows_of_two_lengths_are_errors():
    with pytest.raises(ValueError, match="needs at least one row; got none"):
        collate([], pad_token_id=0)
    with pytest.raises(ValueError, match="must be equally long; got 2 and 1 in row 0"):
        collate([{"input_ids": [1, 2], "segment_ids": [1]}], pad_token_id=0)
