"""Read records of chat and preference data, in several schemas, as conversations in one form."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from redraft.data.files import at_place, require_text

Message = dict[str, Any]
"""Role and content, and optionally thoughts, tool calls and weight 0; the first message holds the tools."""

DOCUMENT = "\0document"
"""Role of the only message of a plain text that is mixed with conversations; no record may have this name."""
SCHEMAS: dict[str, tuple[tuple[str, ...], ...]] = {
    "chat": (("messages",), ("prompt", "response"), ("prompt", "completion"), ("instruction", "output")),
    "preference": (
        ("prompt", "chosen", "rejected"),
        ("instruction", "chosen", "rejected"),
        ("question", "chosen", "rejected"),
        ("chosen", "rejected"),
    ),
}
"""The fields by which a record of each kind is known."""
SYSTEM_FIELDS = ("system", "system_prompt")
CONTEXT_FIELDS = (*SYSTEM_FIELDS, "history", "tools")
"""Fields that a record of any schema may have, and that belong before its messages."""
DIALOGUE = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
"""Turns in a text, as in hh-rlhf."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "train", "training", "loss")
"""Names, in OpenAI's files and other frameworks, of the weight of an answer: 0 or false if it is not learnt."""
TOOL_FIELDS = ("name", "tool_call_id")
MESSAGE_FIELDS = {"assistant": (*THOUGHTS, "tool_calls", *WEIGHTS), "tool": TOOL_FIELDS}
"""Fields that a message of a role may have beside role and content."""
AFTER_ANSWERS = ("system", "developer", "user", "tool", "function")
"""Roles that may follow the last answer."""


def record_parser(kind: str, unused: Counter[str]) -> Callable[[Any], str]:
    """Make the parser of one source: a record to the JSON of its messages (chat) or of two conversations (preference).

    The first record decides the schema. Raises ValueError at the first record that has another, and at a malformed one.
    Fields that are not used are counted in `unused`.
    """
    first: tuple[str, ...] | None = None

    def parse(record: Any) -> str:
        nonlocal first
        schema = _schema_of(record, kind)
        first = first or schema
        if schema != first:
            raise ValueError(
                f"a record of {'/'.join(schema)}, but those before it have {'/'.join(first)}. Use one schema."
            )
        read = _read_conversation(record, schema) if kind == "chat" else _read_pair(record, schema)
        unused.update(_unused_fields(record, schema))
        return json.dumps(read, ensure_ascii=False)

    return parse


def as_conversation(document: str) -> str:
    """Return the JSON of plain text that is mixed with conversations."""
    return json.dumps([{"role": DOCUMENT, "content": document}], ensure_ascii=False)


def is_given(value: Any) -> bool:
    """Tell whether a field holds anything; tables fill absent fields with null or an empty value."""
    return value is not None and value not in ("", [], {})


def _schema_of(record: Any, kind: str) -> tuple[str, ...]:
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object; got {type(record).__name__}. Edit or remove it.")
    for fields in SCHEMAS[kind]:
        if all(record.get(field) is not None for field in fields):  # tables fill absent fields with null
            return fields
    hint = " Pairs of answers need --data.kind preference." if "chosen" in record and kind == "chat" else ""
    names, known = ", ".join(sorted(map(str, record))), ", ".join(map("/".join, SCHEMAS[kind]))
    raise ValueError(f"no known schema; it has {names}. Known are {known}.{hint}")


def _unused_fields(record: Mapping[str, Any], fields: tuple[str, ...]) -> Iterator[str]:
    used = {*fields, *CONTEXT_FIELDS, *(("input",) if "instruction" in fields else ())}
    yield from (str(name) for name, value in record.items() if name not in used and is_given(value))
    for message in (message for name in fields if isinstance(record[name], list) for message in record[name]):
        known = ("role", "content", *MESSAGE_FIELDS.get(message["role"], ()))
        for name, value in message.items():
            if name not in known and is_given(value) and not (name in WEIGHTS and value == 0):
                yield f"{name} of {message['role']} messages"


def _read_conversation(record: Mapping[str, Any], fields: tuple[str, ...]) -> list[Message]:
    messages = record[fields[0]]
    if len(fields) == 2:
        messages = _joined(_question(record, fields[0]), record[fields[1]])
    return _with_context(record, messages)


def _read_pair(record: Mapping[str, Any], fields: tuple[str, ...]) -> list[list[Message]]:
    prompt = _question(record, fields[0]) if len(fields) == 3 else []
    prompt, answers = _prompt_and_answers(prompt, [record["chosen"], record["rejected"]])
    chosen, rejected = (_with_context(record, _joined(prompt, answer)) for answer in answers)
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected must answer the same prompt. Edit or remove it.")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same answer. Edit or remove it.")
    return [chosen, rejected]


def _question(record: Mapping[str, Any], field: str) -> Any:
    if field == "instruction" and record.get("input"):
        return f"{record[field]}\n\n{record['input']}"
    return record[field]


def _prompt_and_answers(prompt: Any, answers: list[Any]) -> tuple[Any, list[Any]]:
    """Return a prompt and its two answers; texts that hold a whole dialogue (hh-rlhf) are read as turns."""
    if not is_given(prompt) or (isinstance(prompt, str) and not prompt.strip()):
        prompt = []
    asked = _dialogue(prompt)
    if asked and asked[-1] == {"role": "assistant", "content": ""}:
        begins = prompt.strip()
        texts = [a if not isinstance(a, str) or a.strip().startswith(begins) else prompt + a for a in answers]
        return asked[:-1], [_dialogue(text) if isinstance(text, str) else text for text in texts]
    dialogues = [_dialogue(answer) for answer in answers]
    if prompt == []:
        answers = [turns if len(turns) > 1 else answer for turns, answer in zip(dialogues, answers, strict=True)]
        if any(isinstance(answer, str) for answer in answers):
            raise ValueError(
                "chosen and rejected are texts without a prompt. Give a field prompt, lists of messages, or texts of"
                " 'Human:' and 'Assistant:' turns."
            )
        return [], answers
    if all(len(turns) > 1 for turns in dialogues):  # if only one is a dialogue, it is an answer that looks like one
        return asked or prompt, dialogues
    return prompt, _without_prompt(prompt, answers)


def _without_prompt(prompt: Any, answers: list[Any]) -> list[Any]:
    """Remove the prompt from two texts that both begin with it; if only one does, that answer quotes the prompt."""
    last = prompt[-1] if isinstance(prompt, list) else {"content": prompt}
    asked = last.get("content") if isinstance(last, Mapping) else None
    if not isinstance(asked, str) or not all(isinstance(answer, str) for answer in answers):
        return answers
    asked = asked.strip()
    rests = [answer.lstrip().removeprefix(asked) for answer in answers if answer.lstrip().startswith(asked)]
    if len(rests) < 2 or not all(rest.strip() for rest in rests):
        return answers
    if asked[-1:].isalnum() and not all(rest[0].isspace() for rest in rests):  # "Hello" in "Hello! How are you?"
        return answers
    return [rest.removeprefix(" ").lstrip("\r\n") for rest in rests]


def _dialogue(text: Any) -> list[Message]:
    """Read a text that begins with `Human:` as turns; nothing for another."""
    if not isinstance(text, str) or not re.match(r"\s*Human:", text):
        return []
    _, *parts = DIALOGUE.split(text)
    roles = ({"Human": "user", "Assistant": "assistant"}[name] for name in parts[::2])
    return [{"role": role, "content": part.strip()} for role, part in zip(roles, parts[1::2], strict=True)]


def _joined(prompt: Any, answer: Any) -> list[Any]:
    """Put a prompt before an answer, each a text or messages.

    An answer that is the whole conversation contains the prompt, at its beginning or as its last question. Only one of
    the two may have a system message. Raises ValueError where such a conversation has another prompt.
    """
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    asked, answered = _turns(before), _turns(after)
    is_whole = after and isinstance(after[0], Mapping) and after[0].get("role") in ("user", "system", "developer")
    begins, ends = answered[: len(asked)] == asked, answered[-len(asked) - 1 : -1] == asked
    if len(answered) > len(asked) and (begins or (is_whole and ends)):
        return _with_system(_systems(before), after)
    if is_whole:
        raise ValueError(
            "the answer is a whole conversation with another prompt than the record's. Remove the prompt, or give the"
            " answer alone, as messages."
        )
    return [*before, *after]


def _systems(messages: list[Any]) -> list[Any]:
    return [m for m in messages if isinstance(m, Mapping) and m.get("role") in ("system", "developer")]


def _turns(messages: list[Any]) -> list[Any]:
    """Return roles and contents of messages for a comparison, without system messages."""
    systems = _systems(messages)
    return [
        (m.get("role"), str(m.get("content")).strip()) if isinstance(m, Mapping) else m
        for m in messages
        if m not in systems
    ]


def _with_system(systems: list[Any], messages: list[Any]) -> list[Any]:
    """Put system messages before a conversation, which may have them already."""
    present = _systems(messages)
    if systems and present and [m.get("content") for m in present] != [m.get("content") for m in systems]:
        raise ValueError("two system messages that differ. Leave one of them out.")
    return messages if present else [*systems, *messages]


def _with_context(record: Mapping[str, Any], messages: Any) -> list[Message]:
    """Put a record's system message and history before its messages, check them, and give them its tools."""
    if not isinstance(messages, list):
        return _read_messages(messages)  # which refuses it
    if is_given(history := record.get("history")):
        if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
            raise ValueError(f"history must be a list of [question, answer]; got {_excerpt(history)}. Edit it.")
        roles = ("user", "assistant")
        before = [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn, strict=True)]
        systems = _systems(messages)
        messages = [*systems, *before, *(m for m in messages if m not in systems)]
    for name in SYSTEM_FIELDS:
        if is_given(record.get(name)):
            messages = _with_system([{"role": "system", "content": record[name]}], messages)
    read, tools = _read_messages(messages), _from_json(record.get("tools") or [], "tools")
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools must be a list of functions' JSON schemas; got {_excerpt(tools)}. Edit it.")
    return [read[0] | {"tools": list(tools)}, *read[1:]] if tools else read


def _read_messages(messages: Any) -> list[Message]:
    """Return the messages up to the last answer to be learnt, with the fields that are used.

    Raises ValueError for malformed messages, and where there is no answer to learn.
    """
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise ValueError('messages must be a list of {"role": ..., "content": ...}. Edit or remove it.')
    read: list[Message] = []
    for number, message in enumerate(messages, start=1):
        with at_place(f"message {number}"):
            read.append(_read_message(message))
    answers = [i for i, message in enumerate(read) if message["role"] == "assistant"]
    learnt = [i for i in answers if "weight" not in read[i]]
    if not learnt:
        why = "every assistant turn has weight 0" if answers else "no assistant turn"
        raise ValueError(f"{why}, so there is nothing to learn. Edit or remove the conversation.")
    for message in read[answers[-1] + 1 :]:
        if message["role"] not in AFTER_ANSWERS:
            raise ValueError(
                f"a message of role {message['role']!r} follows the last answer and would be left out."
                " Answers have role assistant."
            )
    return read[: learnt[-1] + 1]


def _read_message(message: Mapping[str, Any]) -> Message:
    role = message["role"]
    if not (isinstance(role, str) and re.fullmatch(r"[\w .-]+", role)):
        raise ValueError(f"role must be a name such as user; got {role!r}. Edit or remove it.")
    read: Message = {"role": role, "content": message.get("content")}
    if role == "assistant":
        read |= {name: require_text(message[name], name) for name in THOUGHTS if is_given(message.get(name))}
        if is_given(message.get("tool_calls")):
            read["tool_calls"] = _tool_calls(message["tool_calls"])
            read["content"] = read["content"] or ""
        for name in WEIGHTS:
            if (weight := message.get(name)) not in (None, 0, 1):
                raise ValueError(f"{name} must be 0 or 1; got {weight!r}. Other weights of a loss are not supported.")
            if weight == 0:
                read["weight"] = 0
    if role == "tool":
        read |= {name: message[name] for name in TOOL_FIELDS if is_given(message.get(name))}
    content = require_text(read["content"], "content")
    if role == "assistant" and not content.strip() and "tool_calls" not in read:
        raise ValueError("an empty assistant turn. Edit or remove it.")
    return read


def _from_json(value: Any, name: str) -> Any:
    """Read JSON in a string: tables and OpenAI's files store objects without a fixed form like that."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error}). Edit or remove it.") from error


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """Return calls with their arguments as objects: chat templates turn them into JSON."""
    calls = _from_json(calls, "tool_calls")
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'tool_calls must be a list of {{"function": {{"name": ..., "arguments": ...}}}}; got {_excerpt(call)}.'
                " Edit or remove it."
            )
        arguments = _from_json(function.get("arguments") or {}, "the arguments of a tool call")
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read


def _excerpt(value: Any) -> str:
    return repr(value)[:60]
