"""Sudoku: rules, puzzles with one solution, and grids as rows of tokens."""

from random import Random

import numpy as np
import pytest

import redraft.data.grids as grids
from redraft.data.config import DataConfig
from redraft.data.sudoku import SudokuRules

FOUR, NINE = SudokuRules(size=4), SudokuRules(size=9)
PUZZLE = "53__7____ 6__195___ _98____6_ 8___6___3 4__8_3__1 7___2___6 _6____28_ ___419__5 ____8__79"


def test_there_are_288_grids_of_four_and_all_obey_the_rules():
    every = list(FOUR.solutions([0] * 16))
    assert len(every) == len({tuple(grid) for grid in every}) == 288
    assert all(FOUR.is_solved([0] * 16, grid) for grid in every)


def test_a_puzzle_has_one_solution_which_keeps_its_clues():
    puzzle = NINE.read(PUZZLE)
    [solution] = NINE.solutions(puzzle)
    assert NINE.is_solved(puzzle, solution)
    assert NINE.is_easy(puzzle)
    for broken in ([9, *solution[1:]], solution[::-1], solution[1:] + solution[:1]):
        assert not NINE.is_solved(puzzle, broken)
    assert not NINE.is_solved([9, *puzzle[1:]], solution)


def test_clues_are_removed_while_the_solution_is_the_only_one():
    [grid] = grids.solved_grids(NINE, 1, bases=1, seed=0)
    grid = grid.tolist()
    puzzle = NINE.puzzle(grid, clues=40, random=Random(0))
    assert sum(map(bool, puzzle)) == 40
    assert list(NINE.solutions(puzzle)) == [grid]
    least = FOUR.puzzle(next(FOUR.solutions([0] * 16)), clues=0, random=Random(0))
    assert 4 <= sum(map(bool, least)) <= 8
    assert not NINE.is_easy([0] * 81)


def test_a_text_that_is_no_grid_is_refused():
    for text in ("12", "5" * 16, "x" * 16):
        with pytest.raises(ValueError, match="a grid has 16 cells of 1 to 4 or _; got"):
            FOUR.read(text)


def test_permuted_grids_are_solved_and_differ():
    rows = grids.solved_grids(NINE, 50, bases=2, seed=0)
    assert all(NINE.is_solved([0] * 81, row.tolist()) for row in rows)
    assert len(np.unique(rows, axis=0)) == 50
    assert (rows == grids.solved_grids(NINE, 50, bases=2, seed=0)).all()


@pytest.mark.parametrize(
    "typed", [PUZZLE, PUZZLE.replace("_", "."), PUZZLE.replace("_", "0").replace(" ", "\n") + "\n"]
)
def test_a_puzzle_may_be_typed_in_several_ways(typed):
    tokenizer = grids.grid_tokenizer()
    ids = tokenizer(typed, add_special_tokens=False)["input_ids"]
    assert len(ids) == 89
    assert ids.count(tokenizer.mask_token_id) == 51
    assert tokenizer.decode(ids).split() == PUZZLE.split()
    assert tokenizer.decode(ids, skip_special_tokens=True).replace("\n", "") == PUZZLE.replace("_", "").replace(" ", "")


def test_rows_hold_grids_of_both_sizes_whose_cells_alone_are_learnt(monkeypatch):
    monkeypatch.setattr(grids, "NUM_GRIDS", {4: 30, 9: 20})
    monkeypatch.setattr(grids, "NUM_BASES", 2)
    monkeypatch.setattr(grids, "NUM_VALIDATION", 3)
    config = DataConfig(kind="redraft.data.grids:prepare_grids", source="9,4", seq_len=89)
    data = grids.prepare_grids(config, tokenizer=None, objective="masked")
    assert (len(data.train), data.train.lengths()) == (50, [89] * 20 + [19] * 30)
    for row, rules in ((data.train[0], NINE), (data.train[49], FOUR)):
        text = data.tokenizer.decode(row["input_ids"])
        assert rules.is_solved([0] * rules.size**2, rules.read(text))
        assert text.count("\n") == rules.size - 1
        assert [t for t, learnt in zip(text, row["is_target"].tolist(), strict=True) if not learnt] == ["\n"] * (
            rules.size - 1
        )
    texts = [{data.tokenizer.decode(d[i]["input_ids"]) for i in range(len(d))} for d in (data.train, data.validation)]
    assert not texts[0] & texts[1]


def test_other_sizes_and_short_rows_are_refused():
    for source, seq_len, message in (("16", 300, "Use 9, 4 or 9,4"), ("9", 64, "the largest grid has 89 tokens")):
        config = DataConfig(kind="redraft.data.grids:prepare_grids", source=source, seq_len=seq_len)
        with pytest.raises(ValueError, match=message):
            grids.prepare_grids(config, tokenizer=None, objective="masked")
