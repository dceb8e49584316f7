"""Where texts end: every token that training taught or a checkpoint lists, and every stop string, row by row."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from sentence_pieces import KINDS, Script, text_lm_of, tokenizer_of
from tiny import tiny_lm

import redraft
from redraft.data.chat import encode_conversations
from redraft.data.config import ChatConfig
from redraft.sampling.canvas import build_canvas
from redraft.sampling.policies import EndOfSequence, StopStrings, filled

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "ChatML": (CHATML, 3),
    "two special tokens": (CHATML.replace("<|im_end|>", ".<|im_end|></s>"), 3),
    "EOS": (CHATML.replace("<|im_end|>", "</s>"), 1),
    "text alone": (CHATML.replace("<|im_end|>", "\n\n"), 1),
}
LEFT_TO_RIGHT = {"max_new_tokens": 8, "block_size": 1}


def ids_of(tokenizer, *pieces):
    return [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]


def with_template(template):
    tokenizer = deepcopy(tokenizer_of("llama2"))
    tokenizer.chat_template = template
    return tokenizer


def saved(tmp_path, *, tokenizer=None, config=None, generation=None):
    """Write a checkpoint whose files list these ends."""
    lm = tiny_lm(vocab_size=512, dtype=torch.float32)
    lm.model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop("eos_token_id", None)
    (tmp_path / "config.json").write_text(json.dumps(raw | ({} if config is None else {"eos_token_id": config})))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    if tokenizer is not None:
        tokenizer.save_pretrained(tmp_path)
    return redraft.load(tmp_path)


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_stops_at_the_token_that_training_taught_as_the_end_of_an_answer(name, tmp_path):
    template, end = TEMPLATES[name]
    tokenizer = with_template(template)
    messages = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "no"}]
    (example,) = encode_conversations(tokenizer, [json.dumps(messages)], config=ChatConfig(), seq_len=128)
    taught = example.input_ids[example.is_target]
    assert taught[-1] == end
    lm = saved(tmp_path, tokenizer=tokenizer)
    assert set(lm.eos_token_ids) == {1, end}
    out = lm.generate([messages[:1]], guides=[Script([*taught.tolist(), 5, 5])], **LEFT_TO_RIGHT)
    assert out.tokens[0].tolist() == taught.tolist()
    assert out.forwards == [len(taught)]
    assert out.texts[0] == tokenizer.decode([9, *taught.tolist()], skip_special_tokens=True)[1:]


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"config": 7}, [7]),
        ({"config": [7, 9, 8]}, [7, 9, 8]),
        ({"generation": [7, 9]}, [7, 9]),
        ({"config": 7, "generation": 9}, [7, 9]),
        ({"config": [7, 8], "generation": [8, 9]}, [7, 8, 9]),
    ],
)
@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_generation_stops_at_every_id_that_a_checkpoint_lists(files, ends, has_tokenizer, tmp_path):
    lm = saved(tmp_path, tokenizer=tokenizer_of("llama2") if has_tokenizer else None, **files)
    assert set(ends) <= set(lm.eos_token_ids)
    if has_tokenizer:
        assert lm.eos_token_ids == (1, *ends)
    rows = [[20, 21, end, 22] for end in ends]
    for row in rows:
        out = lm.generate([[30]], guides=[Script(row)], **LEFT_TO_RIGHT)
        assert (out.tokens[0].tolist(), out.forwards) == (row[:3], [3])


def test_an_end_that_no_file_lists_is_not_taken_from_the_class_of_the_config(tmp_path):
    lm = saved(tmp_path, tokenizer=tokenizer_of("llama2"))
    assert lm.model.config.eos_token_id == 2  # Llama's default, which is no end here
    assert lm.eos_token_ids == (1,)


def test_the_ends_that_are_given_replace_all_others(tmp_path):
    saved(tmp_path, tokenizer=tokenizer_of("llama2"), config=[7, 8])
    assert redraft.load(tmp_path, eos_token_id=9).eos_token_ids == (9,)
    assert redraft.load(tmp_path, eos_token_id=[9, 10]).eos_token_ids == (9, 10)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "<|im_end|>{{ messages[0]['content'] }}<|im_end|>"]
)
def test_a_template_that_writes_no_answer_leaves_the_end_to_the_tokenizer(template, tmp_path):
    assert saved(tmp_path, tokenizer=with_template(template)).eos_token_ids == (1,)


def test_an_end_among_several_ends_a_row_only_where_everything_before_it_is_decided():
    canvas = build_canvas(
        [torch.tensor([9, 0, 0])] * 3, [torch.tensor([False, True, True])] * 3, noise_token_id=2, device="cpu"
    )
    tokens = torch.tensor([[9, 7, 0], [9, 0, 8], [9, 5, 8]])
    where = torch.tensor([[False, True, False], [False, False, True], [False, True, True]])
    built = canvas.place(where, tokens, torch.ones(3, 3))
    assert EndOfSequence(eos_token_ids=(7, 8))(built, built).tolist() == [True, False, True]
    assert EndOfSequence(eos_token_ids=())(built, built).tolist() == [False, False, True]


def test_stop_strings_end_the_rows_whose_decided_text_holds_one():
    canvas = build_canvas(
        [torch.tensor([9, 0, 0])] * 3, [torch.tensor([False, True, True])] * 3, noise_token_id=2, device="cpu"
    )
    tokens = torch.tensor([[9, 7, 0], [9, 0, 7], [9, 8, 0]])
    where = torch.tensor([[False, True, False], [False, False, True], [False, True, False]])
    built = canvas.place(where, tokens, torch.ones(3, 3))
    seen = []

    def decode(given, new):
        seen.append((given.tolist(), new.tolist()))
        return "", "".join(chr(ord("a") + token) for token in new.tolist())

    stop = StopStrings(strings=("xyz", "h"), decode=decode, otherwise=filled)
    assert stop(built, built).tolist() == [True, False, False]
    assert seen == [([9], [7]), ([9], []), ([9], [8])]
    assert StopStrings(strings=("xyz", "i"), decode=decode, otherwise=filled)(built, built).tolist() == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stop", "count", "text"),
    [("<|im_end|>", 3, "self."), (("never", "<|im_end|>"), 3, "self."), (".", 2, "self"), ("f.", 2, "sel")],
)
def test_stop_strings_end_the_generation_and_are_cut_off_the_text(kind, stop, count, text):
    lm = text_lm_of(kind)
    row = ids_of(lm.tokenizer, "self", ".", "<|im_end|>", "yes")
    out = lm.generate(["un"], stop=stop, guides=[Script(row)], **LEFT_TO_RIGHT)
    assert (out.tokens[0].tolist(), out.texts, out.forwards) == (row[:count], [text], [count])
    plain = lm.generate(["un"], stop=("never",), guides=[Script(row)], **LEFT_TO_RIGHT)
    assert (plain.texts, plain.forwards) == (["self.yesyesyesyesyes"], [8])


def test_rows_stop_where_they_would_alone():
    lm = text_lm_of("llama2")
    words = ids_of(lm.tokenizer, "self", "yes", "no", ".")
    rows = {"Hello": [words[0], 3, *words], "un": words, "able": [*words[:2], 3, 3]}
    scripts = [Script(row) for row in rows.values()]
    alone = [
        lm.generate([prompt], stop="<|im_end|>", guides=[script], **LEFT_TO_RIGHT)
        for prompt, script in zip(rows, scripts, strict=True)
    ]

    def script(logits, canvas, where):  # rows leave the batch: they are told apart by their prompts
        first = {lm.encode(prompt)[0].item(): row for prompt, row in rows.items()}
        return Script(*[first[int(tokens[0])] for tokens in canvas.tokens])(logits, canvas, where)

    out = lm.generate(list(rows), stop="<|im_end|>", guides=[script], **LEFT_TO_RIGHT)
    assert out.texts == [one.texts[0] for one in alone] == ["self", "selfyesno.....", "selfyes"]
    assert out.forwards == [one.forwards[0] for one in alone] == [2, 8, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_text_join_to_the_text_of_all_tokens(kind):
    lm = text_lm_of(kind)
    space = "Ġ" if kind == "bytes" else "▁"
    for prompt, pieces, text in (
        ("Hello", [space + "self", "."], " self."),
        ("Hello", [4 * space, "self", "."], "    self."),
        ("Hello ", ["self", "."], "self."),
        ("un", ["able", "."], "able."),
    ):
        row = ids_of(lm.tokenizer, *pieces, "</s>")
        out = lm.generate([prompt] * 2, guides=[Script(row)], **LEFT_TO_RIGHT)
        assert out.texts == [text] * 2
        assert lm.decode(out.sequences[0]) == prompt + text
        assert lm.decode(out.tokens[0], after=lm.encode(prompt)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_infilling_keeps_the_text_around_a_hole_and_the_spaces_in_it(kind):
    lm = text_lm_of(kind)
    space = "Ġ" if kind == "bytes" else "▁"
    for prompt, piece, text in (
        ("un[MASK:1]able", "self", "unselfable"),
        ("Hello[MASK:1] self", space + "un", "Hello un self"),
        ("Hello[MASK:1]self", 4 * space, "Hello    self"),
        ("Hello[MASK:1]", space, "Hello "),
    ):
        out = lm.infill(prompt, guides=[Script(ids_of(lm.tokenizer, piece))])
        assert out.texts == [text] == [lm.decode(out.sequences[0])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", " ", "un", "un self."])
@pytest.mark.parametrize("options", [["yes", "no"], [" yes", " no"], ["    no"]])
def test_a_constraint_holds_for_what_stands_after_the_prompt(kind, prompt, options):
    lm = text_lm_of(kind)
    if not prompt and kind == "always" and options[0][0] == " ":
        options = [option.lstrip() for option in options]  # this decoder drops every space at the start of a text
    out = lm.generate(prompt, constraint=redraft.Choice(options), max_new_tokens=6, temperature=1.0, num_samples=4)
    assert set(out.texts) <= set(options)


def test_rows_with_and_without_a_prompt_are_constrained_as_they_are_alone():
    lm = text_lm_of("llama2")
    settings = {"constraint": redraft.Choice(["yes", "no"]), "max_new_tokens": 4}
    together = lm.generate(["", "un", ""], **settings)
    for i, prompt in enumerate(["", "un"]):
        assert together.tokens[i].tolist() == lm.generate(prompt, **settings).tokens[0].tolist()
    assert {*together.texts} <= {"yes", "no"}
    preferred = ids_of(lm.tokenizer, "▁yes", "</s>")
    natural = lm.generate(["", "un"], guides=[Script(preferred)], **settings)
    assert natural.tokens[0].tolist() == [*preferred, 1, 1][: len(natural.tokens[0])]
    assert natural.tokens[1][0] != preferred[0]  # there its space would be text


@pytest.mark.parametrize("kind", ["llama2", "first", "bytes"])
def test_a_constraint_holds_for_a_hole(kind):
    lm = text_lm_of(kind)
    for prompt in ("un[MASK:2]able", "[MASK:2]able", "Hello [MASK:2]"):
        out = lm.infill(prompt, constraint=redraft.Regex("(?:self|no)[.!]"))
        before, _, after = prompt.partition("[MASK:2]")
        assert out.texts[0] in {f"{before}{word}{end}{after}" for word in ("self", "no") for end in ".!"}


def test_no_other_end_is_text_under_a_constraint():
    lm = text_lm_of("llama2")
    dot = lm.tokenizer.convert_tokens_to_ids(".")
    settings = {"constraint": redraft.Choice(["."]), "max_new_tokens": 2, "guides": [Script([dot])]}
    assert lm.generate("un", **settings).tokens[0].tolist() == [dot, 1]
    ends = replace(lm, eos_token_ids=(1, dot, 10**6), _compiled={})
    out = ends.generate("un", **settings)
    assert out.texts == ["."]
    assert out.tokens[0].tolist() == [*ids_of(lm.tokenizer, "<0x2E>"), 1]  # spelled by what ends no text


def test_no_stop_strings_are_none_with_a_constraint_and_without_a_tokenizer(text_lm):
    assert text_lm.generate("a", constraint=redraft.Choice(("yes",)), max_new_tokens=8, stop=()).texts == ["yes"]
    lm = tiny_lm()
    settings = {"max_new_tokens": 8}
    assert torch.equal(lm.generate([5], stop=(), **settings).tokens[0], lm.generate([5], **settings).tokens[0])


def test_stop_strings_that_a_checkpoint_carries_give_way_to_a_constraint_and_those_given_do_not(text_lm):
    text_lm.model.config.generation = {"stop": ("e",)}
    try:
        constraint = redraft.Choice(("yes",))
        assert text_lm.generate("a", constraint=constraint, max_new_tokens=8).texts == ["yes"]
        with pytest.raises(ValueError, match="a constraint holds for the whole text, which stop strings would cut"):
            text_lm.generate("a", constraint=constraint, max_new_tokens=8, stop=("e",))
    finally:
        text_lm.model.config.generation = None
