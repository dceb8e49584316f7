import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.data.packing import NO_TOKENS, PackingReport, pack, pack_documents
from redraft.data.prepare import open_windows, write_windows

EOS = 999
token_lists = st.lists(st.lists(st.integers(0, 998), max_size=20), max_size=20)


def slow_pack(documents, seq_len):
    """The definition, token by token."""
    stream = [(token, owner) for owner, document in enumerate(documents) for token in [*document, EOS]]
    windows = [stream[start : start + seq_len] for start in range(0, len(stream) // seq_len * seq_len, seq_len)]
    ids = [[token for token, _ in window] for window in windows]
    segments = [[owner - window[0][1] + 1 for _, owner in window] for window in windows]
    return ids, segments, [token for token, _ in stream[len(windows) * seq_len :]]


@given(token_lists, st.integers(1, 12))
def test_packing_equals_its_definition_and_loses_no_token(documents, seq_len):
    windows, tail = pack(documents, seq_len=seq_len, eos_token_id=EOS)
    ids, segments, dropped = slow_pack(documents, seq_len)
    assert windows.input_ids.tolist() == ids
    assert windows.segment_ids.tolist() == segments
    assert tail[0].tolist() == dropped
    assert windows.input_ids.dtype == windows.segment_ids.dtype == np.int32
    assert windows.input_ids.shape[1] == seq_len


@given(token_lists, st.integers(1, 12))
def test_a_segment_ends_exactly_at_each_eos(documents, seq_len):
    windows, _ = pack(documents, seq_len=seq_len, eos_token_id=EOS)
    assert (windows.segment_ids[:, :1] == 1).all()
    steps = np.diff(windows.segment_ids, axis=1)
    np.testing.assert_array_equal(steps, (windows.input_ids[:, :-1] == EOS).astype(np.int32))


@given(token_lists, st.integers(1, 12), st.integers(0, 20))
def test_packing_in_two_batches_equals_packing_at_once(documents, seq_len, cut):
    whole, whole_tail = pack(documents, seq_len=seq_len, eos_token_id=EOS)
    first, tail = pack(documents[:cut], seq_len=seq_len, eos_token_id=EOS)
    second, tail = pack(documents[cut:], seq_len=seq_len, eos_token_id=EOS, tail=tail)
    for column in ("input_ids", "segment_ids"):
        joined = np.concatenate([getattr(first, column), getattr(second, column)])
        np.testing.assert_array_equal(joined, getattr(whole, column))
    np.testing.assert_array_equal(tail, whole_tail)


@given(st.lists(st.text("aé", min_size=1, max_size=9), max_size=150), st.integers(1, 12))
def test_the_report_adds_up(documents, seq_len):
    batches = pack_documents(
        documents,
        encode=lambda batch: [list(document.encode()) for document in batch],
        seq_len=seq_len,
        eos_token_id=EOS,
    )
    windows, reports = zip(*batches, strict=True) if documents else ((), ())
    report = sum(reports, PackingReport())
    num_bytes = sum(len(document.encode()) for document in documents)
    assert report.num_documents == len(documents)
    assert report.num_tokens == num_bytes + len(documents)
    assert report.num_windows == sum(len(batch.input_ids) for batch in windows)
    assert report.num_tokens == report.num_windows * seq_len + report.num_dropped_tokens
    assert report.num_dropped_tokens < seq_len


def test_no_documents_give_no_windows_and_an_empty_report():
    windows, tail = pack([], seq_len=4, eos_token_id=EOS)
    assert windows.input_ids.shape == (0, 4)
    assert tail.tolist() == NO_TOKENS.tolist() == [[], []]
    assert not list(pack_documents([], encode=len, seq_len=4, eos_token_id=EOS))


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (65536, np.uint32)])
def test_stored_windows_take_the_smallest_dtype_that_holds_them(tmp_path, largest, dtype):
    batches = ((pack([[token]], seq_len=2, eos_token_id=1)[0], PackingReport(num_windows=1)) for token in (3, largest))
    write_windows(tmp_path, "train", batches, seq_len=2, vocab_size=largest)
    windows, _ = open_windows(tmp_path, "train")
    assert windows.input_ids.dtype == dtype
    assert windows.input_ids.tolist() == [[3, 1], [largest, 1]]


def test_two_million_tokens_keep_their_order():
    documents = [list(range(999))] * 2000
    windows, tail = pack(documents, seq_len=256, eos_token_id=EOS)
    packed = np.concatenate([windows.input_ids.flatten(), tail[0]])
    np.testing.assert_array_equal(packed, np.tile([*documents[0], EOS], 2000))
