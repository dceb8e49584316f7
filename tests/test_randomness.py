import torch

from redraft.randomness import fold, uniform


def test_draws_depend_on_every_counter_and_on_their_order():
    keys = [fold(0, 1, 2), fold(0, 2, 1), fold(1, 0, 2), fold(0, 1), fold(0, 1, 2, 0)]
    assert len({int(key) for key in keys}) == len(keys)


def test_a_draw_does_not_depend_on_what_is_drawn_with_it():
    rows, positions = torch.arange(5), torch.arange(7)
    together = uniform(3, rows[:, None], positions)
    assert torch.equal(together[2, 4], uniform(3, torch.tensor(2), torch.tensor(4)))


def test_draws_are_uniform_and_uncorrelated():
    u = uniform(0, torch.arange(400)[:, None], torch.arange(500))
    assert u.min() >= 0
    assert u.max() < 1
    empirical = u.flatten().sort().values
    expected = (torch.arange(u.numel(), dtype=torch.float64) + 0.5) / u.numel()
    assert (empirical - expected).abs().max() < 1.95 / u.numel() ** 0.5  # Kolmogorov-Smirnov at 0.1 %
    centred = u - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1))):
        correlation = (centred * other).mean() * 12
        assert abs(correlation) < 4 / u.numel() ** 0.5
