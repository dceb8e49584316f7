"""Noise by keys: stratified over the global batch, whatever the batches."""

import pytest
import torch

from redraft.likelihood.problem import CleanRows, NoiseKey, draw_noise
from redraft.processes.masked import MaskedDiffusion

PROCESS = MaskedDiffusion(mask_token_id=2)


def times(step, rows, total):
    ids = torch.zeros(len(rows), 4, dtype=torch.int64)
    key = NoiseKey(seed=0, step=step, rows=torch.tensor(rows), total_rows=total)
    clean = CleanRows(x_0=ids, segment_ids=torch.ones_like(ids), is_target=torch.ones_like(ids, dtype=torch.bool))
    return draw_noise(PROCESS, clean, key).t[:, 0]


def test_every_stratum_is_drawn_once_in_each_step():
    t = times(3, list(range(8)), 8)
    assert torch.equal(((t - 1e-3) / (1 - 1e-3) * 8).ceil().sort().values, torch.arange(1.0, 9.0, dtype=t.dtype))


def test_a_row_sees_every_noise_level_over_the_steps():
    """Were strata tied to rows, the first document would only ever be scored nearly clean."""
    first = torch.cat([times(step, [0], 8) for step in range(600)])
    ordered, expected = first.sort().values, (torch.arange(600) + 0.5) / 600
    assert (ordered - expected).abs().max() < 1.95 / 600**0.5  # Kolmogorov-Smirnov at 0.1 %


def test_noise_does_not_depend_on_the_split_into_batches():
    assert torch.equal(times(5, [0, 1, 2, 3], 4), torch.cat([times(5, [0, 1], 4), times(5, [2, 3], 4)]))


@pytest.mark.parametrize(
    ("has_padding", "isolate_segments", "has_segments"),
    [(True, False, True), (False, True, True), (True, True, True), (False, False, False)],
)
def test_attention_gets_segments_where_there_is_padding_or_documents_are_isolated(
    has_padding, isolate_segments, has_segments
):
    ids = torch.tensor([[1, 1, 2, 2]])
    rows = CleanRows(
        x_0=ids, segment_ids=ids, is_target=ids > 0, has_padding=has_padding, isolate_segments=isolate_segments
    )
    assert (rows.attended_segments is ids) == has_segments
