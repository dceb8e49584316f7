"""Preference records of every public form: the same pair of conversations, the prompt once."""

import json

import pytest

from redraft.data.config import DataConfig
from redraft.data.prepare import prepare
from redraft.data.sources import read_documents

S = {"role": "system", "content": "be brief"}
Q = {"role": "user", "content": "ba?"}
A, B = {"role": "assistant", "content": "lo"}, {"role": "assistant", "content": "mi"}
MORE = [Q, {"role": "assistant", "content": "on"}, {"role": "user", "content": "and ru?"}]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def read_one(tmp_path):
    def read_it(record):
        [pair] = read_documents(write(tmp_path / "a.jsonl", [record]), kind="preference")
        return json.loads(pair)

    return read_it


FORMS = {
    "texts": {"prompt": "ba?", "chosen": "lo", "rejected": "mi"},
    "messages as answers": {"prompt": [Q], "chosen": [A], "rejected": [B]},
    "a text and messages": {"prompt": "ba?", "chosen": [A], "rejected": "mi"},
    "whole conversations": {"chosen": [Q, A], "rejected": [Q, B]},
    "ultrafeedback_binarized": {"prompt": "ba?", "chosen": [Q, A], "rejected": [Q, B], "score_chosen": 1.5},
    "with spaces around": {"prompt": " ba?\n", "chosen": [Q, A], "rejected": [Q, B]},
    "messages and whole conversations": {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]},
    "one answer whole": {"prompt": [Q], "chosen": [Q, A], "rejected": [B]},
    "hh-rlhf": {"chosen": "\n\nHuman: ba?\n\nAssistant: lo", "rejected": "\n\nHuman: ba?\n\nAssistant: mi"},
    "hh-rlhf with a prompt": {"prompt": "\n\nHuman: ba?\n\nAssistant:", "chosen": " lo", "rejected": " mi"},
    "hh-rlhf with a prompt and all": {
        "prompt": "\n\nHuman: ba?\n\nAssistant:",
        "chosen": "\n\nHuman: ba?\n\nAssistant: lo",
        "rejected": "\n\nHuman: ba?\n\nAssistant: mi",
    },
    "hh-rlhf beside its question": {
        "prompt": "ba?",
        "chosen": "\n\nHuman: ba?\n\nAssistant: lo",
        "rejected": "\n\nHuman: ba?\n\nAssistant: mi",
    },
    "hh-rlhf with a prompt and all, without the space before": {
        "prompt": "\n\nHuman: ba?\n\nAssistant:",
        "chosen": "Human: ba?\n\nAssistant: lo",
        "rejected": "Human: ba?\n\nAssistant: mi",
    },
    "hh-rlhf with a prompt and an answer as messages": {
        "prompt": "\n\nHuman: ba?\n\nAssistant:",
        "chosen": [A],
        "rejected": " mi",
    },
    "hh-rlhf with a prompt that ends with its question": {
        "prompt": "\n\nHuman: ba?",
        "chosen": "\n\nHuman: ba?\n\nAssistant: lo",
        "rejected": "\n\nHuman: ba?\n\nAssistant: mi",
    },
    "texts that repeat the prompt": {"prompt": "ba?", "chosen": "ba? lo", "rejected": "ba?\n\nmi"},
    "texts that repeat a prompt of messages": {"prompt": [Q], "chosen": "ba? lo", "rejected": " ba?\nmi"},
    "no prompt as null": {"prompt": None, "chosen": [Q, A], "rejected": [Q, B]},
    "no prompt as an empty text": {"prompt": "", "chosen": [Q, A], "rejected": [Q, B]},
    "no prompt as an empty list": {"prompt": [], "chosen": [Q, A], "rejected": [Q, B]},
    "no prompt as a blank": {"prompt": " \n", "chosen": [Q, A], "rejected": [Q, B]},
    "no instruction": {"instruction": "", "input": "", "chosen": [Q, A], "rejected": [Q, B]},
    "hh-rlhf beside an empty prompt": {
        "prompt": "",
        "chosen": "\n\nHuman: ba?\n\nAssistant: lo",
        "rejected": "\n\nHuman: ba?\n\nAssistant: mi",
    },
    "instruction": {"instruction": "ba?", "input": "", "chosen": "lo", "rejected": "mi"},
    "question": {"question": "ba?", "chosen": "lo", "rejected": "mi"},
}
SYSTEM_FORMS = {
    "in a field": {"prompt": "ba?", "chosen": "lo", "rejected": "mi", "system": "be brief"},
    "in a field beside conversations": {"prompt": "ba?", "chosen": [Q, A], "rejected": [Q, B], "system": "be brief"},
    "in the prompt": {"prompt": [S, Q], "chosen": [A], "rejected": [B]},
    "in the prompt alone": {"prompt": [S, Q], "chosen": [Q, A], "rejected": [Q, B]},
    "in the prompt, and nothing else there": {"prompt": [S], "chosen": [Q, A], "rejected": [Q, B]},
    "in the conversations alone": {"prompt": [Q], "chosen": [S, Q, A], "rejected": [S, Q, B]},
    "in the conversations, the prompt a text": {"prompt": "ba?", "chosen": [S, Q, A], "rejected": [S, Q, B]},
    "in the prompt, and the answers repeat it": {"prompt": [S, Q], "chosen": "ba? lo", "rejected": "ba? mi"},
    "in both": {"prompt": [S, Q], "chosen": [S, Q, A], "rejected": [S, Q, B]},
    "everywhere": {"prompt": [S, Q], "chosen": [S, Q, A], "rejected": [S, Q, B], "system": "be brief"},
}
TURNS_FORMS = {
    "messages": {"prompt": MORE, "chosen": [A], "rejected": [B]},
    "whole": {"prompt": MORE, "chosen": [*MORE, A], "rejected": [*MORE, B]},
    "the first question as prompt": {"prompt": "ba?", "chosen": [*MORE, A], "rejected": [*MORE, B]},
    "the last question as prompt": {"prompt": "and ru?", "chosen": [*MORE, A], "rejected": [*MORE, B]},
    "the last turns as prompt": {"prompt": MORE[1:], "chosen": [*MORE, A], "rejected": [*MORE, B]},
    "the last question beside hh-rlhf": {
        "prompt": "and ru?",
        "chosen": "\n\nHuman: ba?\n\nAssistant: on\n\nHuman: and ru?\n\nAssistant: lo",
        "rejected": "\n\nHuman: ba?\n\nAssistant: on\n\nHuman: and ru?\n\nAssistant: mi",
    },
    "hh-rlhf": {
        "chosen": "\n\nHuman: ba?\n\nAssistant: on\n\nHuman: and ru?\n\nAssistant: lo",
        "rejected": "\n\nHuman: ba?\n\nAssistant: on\n\nHuman: and ru?\n\nAssistant: mi",
    },
    "history": {"instruction": "and ru?", "history": [["ba?", "on"]], "chosen": "lo", "rejected": "mi"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_prompt_once_and_one_answer_each(read_one, form):
    assert read_one(FORMS[form]) == [[Q, A], [Q, B]]


@pytest.mark.parametrize("form", SYSTEM_FORMS)
def test_a_system_message_may_stand_in_one_place_alone_and_comes_once(read_one, form):
    assert read_one(SYSTEM_FORMS[form]) == [[S, Q, A], [S, Q, B]]


@pytest.mark.parametrize("form", TURNS_FORMS)
def test_earlier_turns_belong_to_the_prompt(read_one, form):
    assert read_one(TURNS_FORMS[form]) == [[*MORE, A], [*MORE, B]]


OTHER = {"role": "user", "content": "other?"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "other?", "chosen": [Q, A], "rejected": [Q, B]}, "whole conversation with another prompt"),
        ({"prompt": [OTHER], "chosen": [S, Q, A], "rejected": [S, Q, B]}, "whole conversation with another prompt"),
        (
            {"prompt": "and ru?", "chosen": [*MORE, A], "rejected": [*MORE[:2], OTHER, B]},
            "whole conversation with another prompt",
        ),
        ({"prompt": "and ru?", "chosen": [*MORE, A], "rejected": [OTHER, *MORE[1:], B]}, "answer the same prompt"),
        ({"prompt": "and ru?", "chosen": [*MORE, A], "rejected": [B]}, "answer the same prompt"),
        ({"prompt": "", "chosen": "lo", "rejected": "mi"}, "chosen and rejected are texts without a prompt"),
        ({"prompt": 0, "chosen": [A], "rejected": [B]}, "must be a string; got int"),
        ({"prompt": "ba?", "chosen": "ba? lo", "rejected": "ba? lo"}, "are the same answer"),
        (
            {"prompt": "other?", "chosen": FORMS["hh-rlhf"]["chosen"], "rejected": FORMS["hh-rlhf"]["rejected"]},
            "whole conversation with another prompt",
        ),
        ({"prompt": [S, Q], "chosen": [{**S, "content": "lie"}, Q, A], "rejected": [Q, B]}, "two system messages"),
        ({"chosen": [S, Q, A], "rejected": [Q, B]}, "chosen and rejected must answer the same prompt"),
        ({"chosen": "lo", "rejected": "mi"}, "chosen and rejected are texts without a prompt"),
        ({"prompt": None, "chosen": "lo", "rejected": "mi"}, "chosen and rejected are texts without a prompt"),
        ({"prompt": "ba?", "chosen": [Q], "rejected": [Q]}, "whole conversation with another prompt"),
        ({"prompt": [Q], "chosen": ["lo"], "rejected": ["mi"]}, "messages must be a list of"),
        ({"prompt": "ba?", "chosen": {"a": 1}, "rejected": "mi"}, "must be a string; got dict"),
        ({"prompt": "ba?", "chosen": [], "rejected": "mi"}, "no assistant turn"),
        ({"chosen": "Human: ba?\n\nAssistant:", "rejected": "Human: ba?\n\nAssistant: mi"}, "empty assistant turn"),
    ],
)
def test_a_record_whose_parts_do_not_fit_is_refused(read_one, record, message):
    with pytest.raises(ValueError, match=message) as error:
        read_one(record)
    assert "\n" not in str(error.value)


def test_an_answer_that_speaks_of_humans_is_a_text(read_one):
    pair = {"prompt": "Human: who?", "chosen": "Human: you", "rejected": "lo"}
    assert [turns[-1]["content"] for turns in read_one(pair)] == ["Human: you", "lo"]
    assert all(turns[0]["content"] == "Human: who?" for turns in read_one(pair))


PLAY = "Human: hi\n\nAssistant: yo"


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Write a play", PLAY, "lo"),
        ("Write a play", "lo", f"\n\n{PLAY}"),
        ("hi", PLAY, "lo"),
        ("Human: who says Assistant:", "lo", "mi"),
        ("ba?", "ba? lo", "mi"),
        ("ba?", "mi", "ba? lo"),
        ("ba?", "ba?", "ba? lo"),
        ("Hello", "Hello! How are you?", "Hello."),
        ("A", "Apple", "Ant"),
    ],
)
def test_an_answer_that_does_not_surely_repeat_the_prompt_stays_as_it_is(read_one, prompt, chosen, rejected):
    user = {"role": "user", "content": prompt}
    answers = [{"role": "assistant", "content": text} for text in (chosen, rejected)]
    assert read_one({"prompt": prompt, "chosen": chosen, "rejected": rejected}) == [[user, one] for one in answers]


def test_what_follows_a_repeated_prompt_keeps_its_indent(read_one):
    record = {"prompt": "def f(x):", "chosen": "def f(x):\n    return x", "rejected": "def f(x):\n    pass"}
    assert [turns[1]["content"] for turns in read_one(record)] == ["    return x", "    pass"]


def test_a_completion_that_begins_with_its_prompt_stays_as_it_is(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "ba?", "completion": "ba? lo"}])
    [conversation] = read_documents(source, kind="chat")
    assert json.loads(conversation) == [Q, {"role": "assistant", "content": "ba? lo"}]


def test_every_form_gives_the_same_tokens_and_targets(tmp_path, chat_tokenizer):
    for number, record in enumerate(FORMS.values()):
        source = write(tmp_path / f"{number}.jsonl", [record])
        config = DataConfig(source=source, kind="preference", seq_len=99, validation_fraction=0.0)
        pair = prepare(config, tokenizer=chat_tokenizer).train[0]
        chosen, rejected = pair["chosen"], pair["rejected"]
        texts = [chat_tokenizer.decode(side["input_ids"]) for side in (chosen, rejected)]
        prompt = "<|im_start|>user\nba?<|im_end|>\n<|im_start|>assistant\n"
        assert texts == [f"{prompt}lo<|im_end|>", f"{prompt}mi<|im_end|>"]
        assert chat_tokenizer.decode(chosen["input_ids"][chosen["is_target"]]) == "lo<|im_end|>"
