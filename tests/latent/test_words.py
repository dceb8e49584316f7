"""Thoughts written out as words: what a token model is given, what it learns, and the answer it says."""

import json
from dataclasses import dataclass, replace
from itertools import islice

import pytest

from redraft.data.config import DataConfig
from redraft.data.prepare import build_data, prepare
from redraft.data.tokenizer import MASK
from redraft.latent.config import WORDS
from redraft.latent.encode import encode_examples
from redraft.latent.tasks import TASKS, ExampleFile, WorkedExample, find_task, side_of
from redraft.latent.words import FORMS, WrittenTask

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
                yield WorkedExample(prompt=f"{a} {b}", blocks=blocks, answer=str(a + b))

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
    written = WrittenTask(task=task, form=form)
    for example in islice(written.examples, 50):
        said = written.target(example)
        ids = written.tokenizer(said, add_special_tokens=False)["input_ids"]
        for text in (said, written.tokenizer.decode(ids, skip_special_tokens=True)):
            assert task.is_solved(example.prompt, written.answer(text))
        assert not task.is_solved(example.prompt, written.answer(""))


def test_forms_of_countdown():
    task = First(find_task("countdown"))
    example = next(task.examples())
    written = WrittenTask(task=task)
    assert written.given(example.prompt) == example.prompt
    assert written.target(example) == " ".join(example.blocks)
    assert set(written.tokenizer.get_vocab()) == set(find_vocabulary(task))
    paused = replace(written, form="pause")
    assert paused.given(example.prompt) == " ".join([example.prompt, *[MASK] * 8])


def find_vocabulary(task):
    words = {word for e in task.examples() for text in e.texts() for word in text.split()}
    return words | {"<|pad|>", "<|eos|>", "<|mask|>", "<|unk|>"}


def test_compositions_are_read_by_their_last_product_and_padded_to_the_longest_prompt():
    task = First(find_task("composition"))
    written = WrittenTask(task=task, pads_prompt=True)
    for example in islice(written.examples, 20):
        words = written.given(example.prompt).split()
        assert (len(words), words.count(MASK)) == (12, 12 - len(example.blocks))
        assert written.answer(written.target(example)) == example.blocks[-1]
    direct = replace(written, form="direct")
    assert direct.target(written.examples[0]) == written.examples[0].answer


@pytest.mark.parametrize(("form", "objective"), [("written", "ar"), ("pause", "ar"), ("written", "masked")])
def test_rows_learn_what_is_said_and_its_end_and_hold_prompts_out(own_file, form, objective):
    """Masked diffusion learns the EOS that fills the canvas up, too."""
    is_filled = objective == "masked"
    written = WrittenTask(task=ExampleFile(path=own_file), form=form, fills_answer=is_filled)
    config = DataConfig(kind=WORDS, source=f"{own_file}:{form}", seq_len=40)
    data = prepare(config, objective=objective)
    assert data.generation == {"max_new_tokens": written.longest_target}
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
            assert tokenizer.decode(told[:end]) == written.target(example)
            assert set(told[end:]) == {tokenizer.eos_token_id}
            assert len(told) == (written.longest_target if is_filled else end + 1)
            assert is_target.tolist() == sorted(is_target.tolist())
            assert (row["segment_ids"] == 1).all()
            seen.add(example.prompt)
    assert len(seen) == len(written.examples) == data.train_report.num_windows + data.validation_report.num_windows


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"data.max_documents is not for kind .*; got 3. Leave it out"):
        DataConfig(kind=WORDS, source="countdown", max_documents=3)
    with pytest.raises(ValueError, match="unknown task 'countdow'.*Did you mean 'countdown'"):
        prepare(DataConfig(kind=WORDS, source="countdow"))


@pytest.mark.parametrize("kind", ["redraft.latent.words:gone", "no_such_module:rows"])
def test_a_kind_that_cannot_be_imported_is_told(kind):
    with pytest.raises(ValueError, match=f"data.kind {kind} cannot be imported"):
        prepare(DataConfig(kind=kind, source="countdown"))


def test_rows_that_are_too_long_are_refused(own_file):
    with pytest.raises(ValueError, match=r"longest row of the task has 17 tokens; got seq_len=14\. Raise data.seq_len"):
        prepare(DataConfig(kind=WORDS, source=str(own_file), seq_len=14))


def test_thoughts_are_not_built(own_file, tmp_path):
    with pytest.raises(ValueError, match="data of kind .*prepare_words cannot be built"):
        build_data(DataConfig(kind=WORDS, source=str(own_file)), tmp_path / "built")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pads_prompt", [False, True])
def test_the_form_is_read_from_the_source(tmp_path, form, pads_prompt):
    path = tmp_path / "a:b.jsonl"
    path.write_text('{"prompt": "a", "blocks": ["b"], "answer": "c"}')
    for source in ("countdown", str(path)):
        written = WrittenTask.from_source(f"{source}:{form}{':padded' * pads_prompt}")
        assert (written.task, written.form, written.pads_prompt) == (find_task(source), form, pads_prompt)
    assert WrittenTask.from_source("countdown") == WrittenTask(task=find_task("countdown"))


def written_file(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(dict(zip(("prompt", "blocks", "answer"), row, strict=True))) for row in rows))
    return WrittenTask(task=ExampleFile(path=path))


def test_a_file_with_some_answers_is_solved_by_what_its_rows_say(tmp_path):
    written = written_file(tmp_path, [("a b", ["b", "a"], ""), ("c d", ["d", "c"], "none")])
    assert all(written.task.is_solved(e.prompt, written.answer(written.target(e))) for e in written.examples)


@pytest.mark.parametrize("word", ["<|answer|>", "x<|answer|>", "<|eos|>", "x<|mask|>"])
def test_words_that_hold_a_mark_or_a_special_token_are_refused(tmp_path, word):
    written = written_file(tmp_path, [("a", [word, "b c"], "none")])
    with pytest.raises(ValueError, match="(Write|Use) another"):
        written.tokenizer  # noqa: B018


def test_pauses_are_those_of_the_longest_thoughts_whatever_the_order(tmp_path):
    rows = [("a", ["b c d", "e"], "f"), ("a", ["g"], "f")]
    for order in (rows, rows[::-1]):
        written = replace(written_file(tmp_path, order), form="pause")
        assert written.given("a") == " ".join(["a", *[MASK] * 4])


def test_prompts_that_differ_in_spaces_are_on_one_side(tmp_path):
    rows = [(f"{a}{space}b", ["c"], "d") for a in range(60) for space in (" ", "  ")]
    written = written_file(tmp_path, rows)
    sides = [side_of(e.prompt, held_out=0.1) for e in written.examples]
    assert sides[::2] == sides[1::2]
    assert set(sides) == {"train", "validation"}
    held_out = encode_examples(written.examples, written.tokenizer, split="validation", held_out=0.1).examples
    assert len(held_out) == sides.count("validation")


def test_a_start_is_refused_as_it_brings_a_tokenizer(own_file):
    with pytest.raises(ValueError, match="thoughts in words have a tokenizer of their own"):
        prepare(DataConfig(kind=WORDS, source=str(own_file)), tokenizer=WrittenTask.from_source("countdown").tokenizer)
