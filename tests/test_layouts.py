import pytest
import torch

from redraft.layouts import Layout, attention_mask, segment_positions


def test_full_attention_without_padding_needs_no_mask():
    assert attention_mask(Layout(), torch.arange(4)[None]) is None


def test_padding_is_seen_by_nobody_but_itself():
    mask = attention_mask(Layout(), torch.arange(3)[None], segment_ids=torch.tensor([[1, 1, 0]]))
    assert mask[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]


def test_block_causal_is_bidirectional_inside_a_block_and_causal_over_blocks():
    mask = attention_mask(Layout(block_size=2), torch.arange(5)[None])
    assert mask[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_isolated_documents_see_only_themselves_and_restart_their_positions():
    segments = torch.tensor([[1, 1, 2, 2, 2]])
    mask = attention_mask(Layout(), segment_positions(segments), segment_ids=segments, isolate_segments=True)
    assert torch.equal(mask[0, 0], segments[0][:, None] == segments[0])
    assert segment_positions(segments).tolist() == [[0, 1, 0, 1, 2]]


@pytest.mark.parametrize("layout", ["causal", ("block-causal",), ("block-causal", 0)])
def test_an_unknown_layout_is_told(layout):
    with pytest.raises(ValueError, match=r"layout must be|block_size must be at least 1"):
        Layout.parse(layout)
