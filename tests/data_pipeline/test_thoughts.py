"""Thoughts written out as words: what a token model is given, what it learns, and the answer it says."""

import json
from dataclasses import dataclass, replace
from itertools import islice

import pytest

from redraft.data.config import FORMS, DataConfig, ThoughtConfig
from redraft.data.prepare import build_data, prepare
from redraft.data.tasks import TASKS, Example, ExampleFile, encode, find_task, side_of
from redraft.data.thoughts import WrittenTask
from redraft.data.tokenizer import MASK
from redraft.models.config import ModelConfig
from redraft.recipes import RECIPES
from redraft.training.config import ObjectiveConfig

FEW = 200


@dataclass(frozen=True)
class First:
    """The first examples of a task, or other ones judged by it."""

    task: object
    count: int = FEW

    def __getattr__(self, name):
        return getattr(self.task, name)

    def examples(self):
        return islice(self.task.examples(), self.count)


@dataclass(frozen=True)
class Sums:
    """Blocks of different lengths, whose boundaries the answer depends on."""

    held_out: float = 0.2

    def examples(self):
        for a in range(8):
            for b in range(8):
                blocks = (f"{a} + {b}", f"= {a + b}", "so it is")[: 2 + a % 2]
                yield Example(prompt=f"{a} {b}", blocks=blocks, answer=str(a + b))

    def answer(self, blocks):
        return blocks[1].removeprefix("= ") if len(blocks) > 1 else ""

    def is_solved(self, prompt, answer):
        return answer == str(sum(map(int, prompt.split())))


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    """A file, of whose thoughts no rule makes the answer."""
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    rows = [
        {"prompt": f"{a} {b}", "blocks": [f"{a} and {b}", "well"][: 1 + b % 2], "answer": "x " * a + f"y {b}"}
        for a in range(1, 8)
        for b in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module", params=[*TASKS, "sums", "file"])
def task(request, own_file):
    if request.param == "sums":
        return Sums()
    return ExampleFile(path=own_file) if request.param == "file" else First(find_task(request.param))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_said_says_the_answer_before_and_after_the_tokenizer(task, form):
    written = WrittenTask(task=task, config=ThoughtConfig(form=form))
    for example in islice(written.examples, 50):
        said = written.said(example)
        ids = written.tokenizer(said, add_special_tokens=False)["input_ids"]
        for text in (said, written.tokenizer.decode(ids, skip_special_tokens=True)):
            assert task.is_solved(example.prompt, written.answer(text))
        assert not task.is_solved(example.prompt, written.answer(""))


def test_forms_of_countdown():
    task = First(find_task("countdown"))
    example = next(task.examples())
    written = WrittenTask(task=task, config=ThoughtConfig())
    assert written.given(example.prompt) == example.prompt
    assert written.said(example) == " ".join(example.blocks)
    assert set(written.tokenizer.get_vocab()) == set(find_vocabulary(task))
    paused = replace(written, config=ThoughtConfig(form="pause"))
    assert paused.given(example.prompt) == " ".join([example.prompt, *[MASK] * 8])


def find_vocabulary(task):
    words = {word for e in task.examples() for text in e.texts() for word in text.split()}
    return words | {"<|pad|>", "<|eos|>", "<|mask|>", "<|unk|>"}


def test_compositions_are_read_by_their_last_product_and_padded_to_the_longest_prompt():
    task = First(find_task("composition"))
    written = WrittenTask(task=task, config=ThoughtConfig(pad_prompt=True))
    for example in islice(written.examples, 20):
        words = written.given(example.prompt).split()
        assert (len(words), words.count(MASK)) == (12, 12 - len(example.blocks))
        assert written.answer(written.said(example)) == example.blocks[-1]
    direct = replace(written, config=ThoughtConfig(form="direct"))
    assert direct.said(written.examples[0]) == written.examples[0].answer


@pytest.mark.parametrize("config", [ThoughtConfig(), ThoughtConfig(form="pause"), ThoughtConfig(fill=True)])
def test_rows_learn_what_is_said_and_its_end_and_hold_prompts_out(own_file, config):
    written = WrittenTask(task=ExampleFile(path=own_file), config=config)
    data = prepare(DataConfig(kind="thought", source=str(own_file), thought=config, seq_len=40))
    assert data.generation == {"max_new_tokens": written.longest_said}
    tokenizer, seen = data.tokenizer, set()
    by_text = {written.given(e.prompt): e for e in written.examples}
    for split, rows in (("train", data.train), ("validation", data.validation)):
        assert len(rows) > 0
        for row in rows:
            ids, is_target = row["input_ids"], row["is_target"]
            example = by_text[tokenizer.decode(ids[~is_target])]
            assert side_of(example.prompt, held_out=0.1) == split
            told = ids[is_target].tolist()
            end = told.index(tokenizer.eos_token_id)
            assert tokenizer.decode(told[:end]) == written.said(example)
            assert set(told[end:]) == {tokenizer.eos_token_id}
            assert len(told) == (written.longest_said if config.fill else end + 1)
            assert is_target.tolist() == sorted(is_target.tolist())
            assert (row["segment_ids"] == 1).all()
            seen.add(example.prompt)
    assert len(seen) == len(written.examples) == data.train_report.num_windows + data.validation_report.num_windows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "countdow"}, "unknown task 'countdow'.*Did you mean 'countdown'"),
        ({"source": "countdown", "max_documents": 3}, "max_documents is not for kind thought; got 3"),
        ({"source": "countdown", "validation_fraction": 0.5}, "validation_fraction is not for kind thought"),
        ({"source": "countdown", "kind": "text", "thought": ThoughtConfig(fill=True)}, "are for kind thought"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"kind": "thought"} | settings)


def test_rows_that_are_too_long_and_tasks_that_hold_all_out_are_refused(own_file):
    with pytest.raises(ValueError, match=r"longest row of the task has 18 tokens; got seq_len=14\. Raise data.seq_len"):
        prepare(DataConfig(kind="thought", source=str(own_file), seq_len=14))
    everything = WrittenTask(task=Sums(held_out=1.0), config=ThoughtConfig())
    with pytest.raises(ValueError, match="holds out all of its 64 examples"):
        everything.windows("train", seq_len=64)


def test_thoughts_are_not_built(own_file, tmp_path):
    with pytest.raises(ValueError, match="thoughts are read as they are and not built"):
        build_data(DataConfig(kind="thought", source=str(own_file)), tmp_path / "built")


@pytest.mark.parametrize("source", ["countdown", "mine.jsonl", "a:b.jsonl"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pad_prompt", [False, True])
def test_the_name_of_a_form_is_read_back(source, form, pad_prompt):
    config = ThoughtConfig(form=form, pad_prompt=pad_prompt)
    assert ThoughtConfig.from_name(config.name_of(source)) == (source, config)


def written_file(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(dict(zip(("prompt", "blocks", "answer"), row, strict=True))) for row in rows))
    return WrittenTask(task=ExampleFile(path=path), config=ThoughtConfig())


def test_a_file_with_some_answers_is_solved_by_what_its_rows_say(tmp_path):
    written = written_file(tmp_path, [("a b", ["b", "a"], ""), ("c d", ["d", "c"], "none")])
    assert all(written.task.is_solved(e.prompt, written.answer(written.said(e))) for e in written.examples)


@pytest.mark.parametrize("word", ["<|answer|>", "x<|answer|>", "<|eos|>", "x<|mask|>"])
def test_words_that_hold_a_mark_or_a_special_token_are_refused(tmp_path, word):
    written = written_file(tmp_path, [("a", [word, "b c"], "none")])
    with pytest.raises(ValueError, match="Write another in its place"):
        written.tokenizer  # noqa: B018


def test_pauses_are_those_of_the_longest_thoughts_whatever_the_order(tmp_path):
    rows = [("a", ["b c d", "e"], "f"), ("a", ["g"], "f")]
    for order in (rows, rows[::-1]):
        written = replace(written_file(tmp_path, order), config=ThoughtConfig(form="pause"))
        assert written.given("a") == " ".join(["a", *[MASK] * 4])


def test_prompts_that_differ_in_spaces_are_on_one_side(tmp_path):
    rows = [(f"{a}{space}b", ["c"], "d") for a in range(60) for space in (" ", "  ")]
    written = written_file(tmp_path, rows)
    sides = [side_of(e.prompt, held_out=0.1) for e in written.examples]
    assert sides[::2] == sides[1::2]
    assert set(sides) == {"train", "validation"}
    held_out = encode(written.examples, written.tokenizer, split="validation", held_out=0.1).examples
    assert len(held_out) == sides.count("validation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig(start="runs/other")}, "model.start brings its own tokenizer; got data.kind thought"),
        ({"objective": ObjectiveConfig()}, "kind masked fills a canvas of one length.*Add --data.thought.fill"),
    ],
)
def test_runs_that_would_learn_something_else_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPES["thought-ar"](), **changes)
