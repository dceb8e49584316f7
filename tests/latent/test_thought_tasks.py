import json
from dataclasses import replace
from itertools import islice, permutations, product

import pytest
import torch

from redraft.data.sources import split_of
from redraft.latent.encode import encode_examples, word_tokenizer
from redraft.latent.tasks import TASKS, ExampleFile, WorkedExample, find_task
from redraft.latent.tasks.composition import Composition
from redraft.latent.tasks.sudoku import Sudoku


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return find_task(request.param)


def test_examples_are_solved_and_their_answers_follow_from_their_thoughts(task):
    for example in islice(task.examples(), 100):
        assert task.is_solved(example.prompt, example.answer)
        assert task.answer(list(example.blocks)) == example.answer


def test_examples_are_the_same_every_time(task):
    assert list(islice(task.examples(), 5)) == list(islice(task.examples(), 5))


@pytest.mark.parametrize(
    ("prompt", "answer", "is_right"),
    [
        ("3 5 7 22", "5 * 3 15 15 + 7 22", True),
        ("3 5 7 22", "3 * 5 15 7 + 15 22", True),  # in an order the generator never writes
        ("3 5 7 22", "5 * 3 16 16 + 7 23", False),  # false arithmetic
        ("3 5 7 22", "5 * 3 15 15 + 8 23", False),  # a number that is not there
        ("3 5 7 22", "7 * 3 21 21 + 1 22", False),
        ("3 5 7 15", "5 * 3 15 15 * 1 15", False),
        ("3 5 7 22", "5 * 3 15", False),  # a step too few
        ("3 5 7 22", "5 / 3 15 15 + 7 22", False),
        ("3 3 7 16", "3 * 3 9 9 + 7 16", True),
        ("3 3 7 16", "3 * 3 9 7 + 9 x", False),
    ],
)
def test_countdown_is_verified_by_carrying_out_the_steps(prompt, answer, is_right):
    assert TASKS["countdown"].is_solved(prompt, answer) is is_right


def test_countdown_examples_are_all_the_solutions_a_search_finds():
    examples = [e for e in TASKS["countdown"].examples() if e.prompt == "2 3 7 1"]
    assert {e.answer for e in examples} == {"3 * 2 6 7 - 6 1"}


def test_composition_verifies_only_the_product():
    task = Composition()
    assert task.is_solved("21345 13245", "31245")
    assert not task.is_solved("21345 13245", "23145")


def test_sudoku_examples_are_unique_where_they_say_so():
    lines = [*permutations("1234")]
    grids = [grid for rows in product(lines, repeat=4) if is_grid(grid := [cell for row in rows for cell in row])]
    assert len(grids) == 288

    def num_solutions(puzzle):
        clues = puzzle.prompt.split()
        return sum(all(clue in ("_", cell) for clue, cell in zip(clues, grid, strict=True)) for grid in grids)

    assert {num_solutions(puzzle) for puzzle in Sudoku(num_examples=100).examples()} == {1}
    several = replace(TASKS["sudoku-multi"], num_examples=50)
    assert sum(num_solutions(puzzle) > 1 for puzzle in several.examples()) > 40
    assert not TASKS["sudoku"].is_solved("1" + " _" * 15, " ".join("1234" * 4))
    assert not TASKS["sudoku"].is_solved("1" + " _" * 15, " ".join("2143341212344321"))  # the clue is gone


def is_grid(cells):
    """Rows are permutations already; columns and boxes hold four different cells."""
    boxes = [[cells[4 * (r + i) + c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
    return all(len(set(unit)) == 4 for unit in [*(cells[c::4] for c in range(4)), *boxes])


def test_no_held_out_prompt_is_trained_on():
    task = TASKS["countdown"]
    examples = list(islice(task.examples(), 1000))
    tokenizer = word_tokenizer(examples)
    sides = [encode_examples(examples, tokenizer, split=s, held_out=task.held_out) for s in ("train", "validation")]
    prompts = [{e.prompt for e in side.examples} for side in sides]
    assert prompts[1]
    assert not prompts[0] & prompts[1]


def test_encoding_pads_at_the_end_and_decodes_to_the_words(tmp_path):
    rows = [
        {"prompt": "a b", "blocks": ["x", "y z"], "answer": "c"},
        {"prompt": "a", "blocks": ["z"], "answer": "c d"},
        {"prompt": "b", "blocks": ["z"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = find_task(str(path))
    examples = list(task.examples())
    tokenizer = word_tokenizer(examples)
    encoded = encode_examples(examples, tokenizer, split="train", held_out=0.0)
    columns = encoded.columns
    assert columns["blocks"].shape == (3, 2, 2)
    assert columns["num_blocks"].tolist() == [2, 1, 1]
    assert tokenizer.decode(columns["blocks"][0, 1]) == "y z"
    assert columns["answer"][:, -1].tolist() == [0, tokenizer.eos_token_id, 0]
    assert columns["is_answer"].sum(1).tolist() == [2, 3, 0]
    assert (columns["prompt"][~columns["is_prompt"]] == 0).all()
    ids, mask = encoded.real_blocks()
    assert len(ids) == 3  # x, y z, z once
    assert torch.equal(mask, ids != 0)
    assert task.is_solved("a", "c d")
    assert not task.is_solved("a", "d")
    (without,) = [e for e in examples if not e.answer]
    assert task.is_solved(without.prompt, task.answer(list(without.blocks)))
    assert not task.is_solved("nobody", "c d")


def test_a_line_of_json_may_hold_any_line_separator_but_its_own(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "blocks": ["x\u2028y"], "answer": "\x85"}\n', encoding="utf-8")
    assert list(ExampleFile(path=path).examples()) == [WorkedExample(prompt="a", blocks=("x\u2028y",), answer="\x85")]


@pytest.mark.parametrize("answer", ["1 + 2 --8 4 + 4 8", "1 + 2 \u00b2 4 + 4 8", "1 + 2 \u0663 3 + 4 7"])
def test_a_result_that_is_no_number_is_wrong_and_no_error(answer):
    assert not TASKS["countdown"].is_solved("1 2 4 7", answer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 1: must be"),
        ("nonsense", "line 1: must be"),
        ("[1]", "line 1: must be"),
        ('{"prompt": 3, "blocks": ["1"]}', "line 1: must be"),
        ('{"prompt": "a", "blocks": "1 + 2"}', "line 1: must be"),
        ('{"prompt": "a", "blocks": [1, 2]}', "line 1: must be"),
        ('{"prompt": "a", "blocks": ["1"], "answer": null}', "line 1: must be"),
        ('{"prompt": "a", "blocks": []}', "line 1: must be .*prompt and blocks not empty"),
        ('{"prompt": "a", "blocks": ["1", " "]}', "line 1: must be .*prompt and blocks not empty"),
        ('{"prompt": "", "blocks": ["1"]}', "line 1: must be .*prompt and blocks not empty"),
        ("", "rows.jsonl is empty"),
    ],
)
def test_a_line_that_does_not_fit_is_told(line, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        list(ExampleFile(path=path).examples())


@pytest.mark.parametrize(
    ("name", "message"),
    [("countdwn", "unknown task 'countdwn'.*'countdown'"), ("no.jsonl", "there is no file no.jsonl")],
)
def test_mistakes_are_told(name, message):
    with pytest.raises(ValueError, match=message):
        find_task(name)


def test_compositions_too_long_for_training_are_held_out_only():
    task = Composition(num_examples=3000, held_out=0.3)
    long = [e for e in task.examples() if len(e.prompt.split()) > task.longest_trained]
    assert long
    assert all(split_of(e.prompt, validation_fraction=0.3) == "validation" for e in long)
