"""Sudoku grids as rows of tokens: masked diffusion learns solved grids, and a puzzle is a grid with masked cells.

A cell is one character, "_" (the mask token; "." and "0" are read as it) where it is empty; each row of the grid is a
word. So `redraft infill MODEL "53__7____ 6__195___ ..."` solves a puzzle, and the given cells are given tokens.
"""

from itertools import permutations, product
from math import isqrt
from random import Random

import numpy as np

from redraft.data.config import DataConfig
from redraft.data.packing import PackingReport, WindowDataset, Windows
from redraft.data.prepare import PreparedData
from redraft.data.sources import split_of
from redraft.data.sudoku import EMPTY, SudokuRules
from redraft.data.tokenizer import EOS, PAD, Tokenizer

NUM_GRIDS = {4: 12_000, 9: 200_000}
"""Solved grids to learn, by size. There are 288 of 4 x 4, so they are repeated."""
NUM_BASES = 1000
"""Grids of 9 x 9 made by search; the others are these with rows, columns and digits permuted."""
NUM_VALIDATION = 500
HELD_OUT_4 = 0.05
"""Share of the 4 x 4 grids that training does not see."""


def prepare_grids(config: DataConfig, *, tokenizer: Tokenizer | None, objective: str) -> PreparedData:
    """Make solved grids of the sizes in `data.source`, e.g. "9,4"; the ends of rows are given, the cells are learnt.

    Raises ValueError for other sizes, for a tokenizer, and for grids longer than `data.seq_len`.
    """
    sizes = config.source.split(",")
    if not {*sizes} <= {*map(str, NUM_GRIDS)}:
        raise ValueError(f"data.source must be sizes of grids; got {config.source!r}. Use 9, 4 or 9,4.")
    if tokenizer is not None:
        raise ValueError("grids have a tokenizer of their own; got model.start with another. Leave it out.")
    longest = max(map(int, sizes)) * (max(map(int, sizes)) + 1) - 1
    if longest > config.seq_len:
        raise ValueError(f"the largest grid has {longest} tokens; got seq_len={config.seq_len}. Raise data.seq_len.")
    own = grid_tokenizer()
    train, validation = zip(*(_grids(SudokuRules(size=int(size))) for size in sizes), strict=True)
    (train, train_report), (validation, report) = (_windows(own, parts, longest) for parts in (train, validation))
    return PreparedData(
        train=train,
        validation=validation,
        tokenizer=own,
        train_report=train_report,
        validation_report=report,
        generation={"preset": "llada", "temperature": 0.0},
    )


def held_out_grids(rules: SudokuRules) -> np.ndarray:
    """Return the grids that training does not see, (count, size * size) uint8, 0 nowhere."""
    return _grids(rules)[1] if rules.size == 4 else solved_grids(rules, NUM_VALIDATION, bases=NUM_VALIDATION, seed=1)


def _grids(rules: SudokuRules) -> tuple[np.ndarray, np.ndarray]:
    """Return grids for training and for validation; no grid of the one is in the other."""
    count = NUM_GRIDS[rules.size]
    if rules.size == 4:
        every = np.unique(solved_grids(rules, 20 * 288, bases=20, seed=0), axis=0)
        is_held_out = [split_of(rules.text(grid), validation_fraction=HELD_OUT_4) == "validation" for grid in every]
        kept, held_out = every[~np.array(is_held_out)], every[is_held_out]
        return kept[np.arange(count) % len(kept)], held_out
    return solved_grids(rules, count, bases=NUM_BASES, seed=0), held_out_grids(rules)


def _windows(tokenizer: Tokenizer, parts: tuple[np.ndarray, ...], longest: int) -> tuple[WindowDataset, PackingReport]:
    """Put grids of several sizes into padded rows."""
    vocabulary = tokenizer.get_vocab()
    rows = np.full((sum(map(len, parts)), longest), vocabulary[PAD], np.uint8)
    is_target, is_token = np.zeros_like(rows), np.zeros_like(rows)
    start = 0
    for grids in parts:
        cells, size = grids.shape[1], isqrt(grids.shape[1])
        part, place = slice(start, start + len(grids)), np.arange(cells) + np.arange(cells) // size
        rows[part, : cells + size - 1] = vocabulary["\n"]
        rows[part, place] = grids + (vocabulary["1"] - 1)
        is_target[part, place], is_token[part, : cells + size - 1] = 1, 1
        start += len(grids)
    report = PackingReport(
        num_documents=len(rows),
        num_tokens=int(is_token.sum()),
        num_windows=len(rows),
        num_target_tokens=int(is_target.sum()),
    )
    return WindowDataset(windows=Windows(rows, is_token, is_target), is_trimmed=True), report


def solved_grids(rules: SudokuRules, count: int, *, bases: int, seed: int) -> np.ndarray:
    """Draw solved grids, (count, size * size) uint8: made by search, then rows, columns and digits permuted."""
    n, b, rng, random = rules.size, rules.box, np.random.default_rng(seed), Random(seed)
    base = np.array([next(rules.solutions([0] * n * n, random=random)) for _ in range(bases)], np.uint8)
    lines = np.array(
        [
            [b * band + order[band][i] for band in bands for i in range(b)]
            for bands in permutations(range(b))
            for order in product(list(permutations(range(b))), repeat=b)
        ]
    )  # every order of the rows that keeps the bands together
    grids = base[rng.integers(bases, size=count)].reshape(count, n, n)
    rows, columns = (lines[rng.integers(len(lines), size=count)] for _ in range(2))
    grids = np.take_along_axis(grids, rows[:, :, None], axis=1)
    grids = np.take_along_axis(grids, columns[:, None, :], axis=2)
    flipped = rng.random(count) < 0.5
    grids[flipped] = grids[flipped].transpose(0, 2, 1)
    digits = rng.random((count, n)).argsort(axis=1).astype(np.uint8) + 1
    return np.take_along_axis(digits, grids.reshape(count, n * n).astype(np.int64) - 1, axis=1)


def grid_tokenizer() -> Tokenizer:
    """Build a tokenizer with a token for each cell and for the end of a row; the empty cell is the mask token."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, EOS, EMPTY, "\n", *"123456789"]
    backend = Backend(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token=EOS))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Strip(),
            normalizers.Replace(Regex(r"[\s/]+"), "\n"),
            normalizers.Replace(Regex("[.0]"), EMPTY),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    mask = AddedToken(EMPTY, normalized=True, special=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS, mask_token=mask)
