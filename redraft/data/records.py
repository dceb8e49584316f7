"""Records of chat and preference data, whatever their fields are called, as conversations of one form."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

from redraft.data.messages import DOCUMENT, Message, checked, is_given, with_tools

logger = logging.getLogger(__name__)

Kind = Literal["text", "chat", "preference"]

CHAT_SCHEMAS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/response": ("prompt", "response"),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
}
PREFERENCE_SCHEMAS: dict[str, tuple[str, ...]] = {
    "prompt/chosen/rejected": ("prompt", "chosen", "rejected"),
    "instruction/chosen/rejected": ("instruction", "chosen", "rejected"),
    "question/chosen/rejected": ("question", "chosen", "rejected"),
    "chosen/rejected": ("chosen", "rejected"),
}
SYSTEM_FIELDS = ("system", "system_prompt")
CONTEXT_FIELDS = (*SYSTEM_FIELDS, "history", "tools")
"""Fields that a record of any schema may have: what goes before its messages."""
DIALOGUE = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
"""Turns in a text, as in hh-rlhf."""


def record_parser(
    kind: Kind, *, skip_bad: bool = False, unused: Counter[str] | None = None
) -> Callable[[str, Any], str | None]:
    """Make the parser of one source: a record to the JSON of its messages (chat) or of two conversations (preference).

    The first record decides the schema. Raises ValueError at the first record that has another, and at a malformed one
    unless `skip_bad`: then it gives None, and a warning for the first. Counts fields that are not used in `unused`.
    """
    schemas = CHAT_SCHEMAS if kind == "chat" else PREFERENCE_SCHEMAS
    counts = Counter[str]() if unused is None else unused
    first: tuple[str, str] | None = None
    is_warned = False

    def parse(where: str, record: Any) -> str | None:
        nonlocal first, is_warned
        schema = _schema_of(record, schemas, where=where)
        first = first or (schema, where)
        if schema != first[0]:
            raise ValueError(
                f"{where}: a record of {schema}, but {first[1]} has {first[0]}. Use one schema in a source."
            )
        read = _conversation if kind == "chat" else _pair
        try:
            _count_unused(record, schemas[schema], counts)
            return json.dumps(read(record, schemas[schema], where=where, unused=counts), ensure_ascii=False)
        except RecursionError as error:
            raise ValueError(f"{where}: a record nested too deeply. Mend or remove it.") from error
        except ValueError as error:
            if not skip_bad:
                raise
            if not is_warned:
                warn_once(f"Skipped a record, and skip others like it: {error}")
            is_warned = True
            return None

    return parse


@cache
def warn_once(message: str) -> None:
    """Log a warning, which further passes over the same data do not repeat."""
    logger.warning("%s", message)


def as_conversation(document: str) -> str:
    """Return the JSON of plain text that is mixed with conversations."""
    return json.dumps([{"role": DOCUMENT, "content": document}], ensure_ascii=False)


def _schema_of(record: Any, schemas: Mapping[str, tuple[str, ...]], *, where: str) -> str:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a record must be an object; got {type(record).__name__}. Wrap it.")
    for name, fields in schemas.items():
        if all(record.get(field) is not None for field in fields):  # tables fill absent fields with null
            return name
    hint = " Pairs of answers are of --data.kind preference." if "chosen" in record and schemas is CHAT_SCHEMAS else ""
    names = ", ".join(sorted(map(str, record)))
    raise ValueError(f"{where}: no known schema; it has {names}. Known are {', '.join(schemas)}.{hint}")


def _count_unused(record: Mapping[str, Any], fields: tuple[str, ...], unused: Counter[str]) -> None:
    used = {*fields, *CONTEXT_FIELDS, *(("input",) if "instruction" in fields else ())}
    unused.update(str(name) for name, value in record.items() if name not in used and is_given(value))


def _conversation(
    record: Mapping[str, Any], fields: tuple[str, ...], *, where: str, unused: Counter[str]
) -> list[Message]:
    messages = record[fields[0]]
    if len(fields) == 2:
        messages = _joined(_question(record, fields[0]), record[fields[1]], where=where)
    return _with_context(record, messages, where=where, unused=unused)


def _pair(
    record: Mapping[str, Any], fields: tuple[str, ...], *, where: str, unused: Counter[str]
) -> list[list[Message]]:
    prompt = _question(record, fields[0]) if len(fields) == 3 else []
    prompt, answers = _prompt_and_answers(prompt, [record["chosen"], record["rejected"]], where=where)
    chosen, rejected = (
        _with_context(record, _joined(prompt, answer, where=where), where=where, unused=unused) for answer in answers
    )
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(f"{where}: chosen and rejected must answer the same prompt. Mend or remove it.")
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are the same answer. Mend or remove it.")
    return [chosen, rejected]


def _question(record: Mapping[str, Any], field: str) -> Any:
    if field == "instruction" and record.get("input"):
        return f"{record[field]}\n\n{record['input']}"
    return record[field]


def _prompt_and_answers(prompt: Any, answers: list[Any], *, where: str) -> tuple[Any, list[Any]]:
    """Return a prompt and its two answers, with the turns of texts that hold the whole dialogue (hh-rlhf)."""
    if not is_given(prompt) or (isinstance(prompt, str) and not prompt.strip()):
        prompt = []
    asked = _dialogue(prompt) if isinstance(prompt, str) else []
    if asked and asked[-1] == {"role": "assistant", "content": ""}:
        begins = prompt.strip()
        texts = [a if not isinstance(a, str) or a.strip().startswith(begins) else prompt + a for a in answers]
        return asked[:-1], [_dialogue(text) if isinstance(text, str) else text for text in texts]
    turns = [_dialogue(answer) if isinstance(answer, str) else [] for answer in answers]
    if prompt == []:
        answers = [own if len(own) > 1 else answer for own, answer in zip(turns, answers, strict=True)]
        if any(isinstance(answer, str) for answer in answers):
            raise ValueError(
                f"{where}: chosen and rejected are texts without a prompt. Give a field prompt, lists of messages, or"
                " texts of 'Human:' and 'Assistant:' turns."
            )
        return [], answers
    if all(len(own) > 1 for own in turns):  # one alone is an answer that is written as a dialogue
        return asked or prompt, turns
    return prompt, _without_prompt(prompt, answers)


def _without_prompt(prompt: Any, answers: list[Any]) -> list[Any]:
    """Cut the prompt off two texts that both begin with it; where one alone does, it is an answer that quotes."""
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


def _dialogue(text: str) -> list[Message]:
    """Read a text that begins with `Human:` as turns; nothing for another."""
    if not re.match(r"\s*Human:", text):
        return []
    _, *parts = DIALOGUE.split(text)
    roles = ({"Human": "user", "Assistant": "assistant"}[name] for name in parts[::2])
    return [{"role": role, "content": part.strip()} for role, part in zip(roles, parts[1::2], strict=True)]


def _joined(prompt: Any, answer: Any, *, where: str) -> list[Any]:
    """Put a prompt before an answer, each a text or messages.

    An answer that is the whole conversation has the prompt already, as its beginning or as its last question; a system
    message may stand in one of them alone. Raises ValueError where such a conversation has another prompt.
    """
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    given, said = _turns(before), _turns(after)
    is_whole = after and isinstance(after[0], Mapping) and after[0].get("role") in ("user", "system", "developer")
    begins, ends = said[: len(given)] == given, said[-len(given) - 1 : -1] == given
    if len(said) > len(given) and (begins or (is_whole and ends)):
        return _with_system(_systems(before), after, where=where)
    if is_whole:
        raise ValueError(
            f"{where}: the conversation of the answer begins otherwise than the prompt. Remove the prompt, or give the"
            " answer alone, as messages."
        )
    return [*before, *after]


def _systems(messages: list[Any]) -> list[Any]:
    return [m for m in messages if isinstance(m, Mapping) and m.get("role") in ("system", "developer")]


def _turns(messages: list[Any]) -> list[Any]:
    """Return what may be compared of messages: roles and contents, without system messages."""
    systems = _systems(messages)
    return [
        (m.get("role"), str(m.get("content")).strip()) if isinstance(m, Mapping) else m
        for m in messages
        if m not in systems
    ]


def _with_system(systems: list[Any], messages: list[Any], *, where: str) -> list[Any]:
    """Put system messages before a conversation, which may have them already."""
    own = _systems(messages)
    if systems and own and [m.get("content") for m in own] != [m.get("content") for m in systems]:
        raise ValueError(f"{where}: two system messages that differ. Leave one of them out.")
    return messages if own else [*systems, *messages]


def _with_context(record: Mapping[str, Any], messages: Any, *, where: str, unused: Counter[str]) -> list[Message]:
    """Put a record's system message and history before its messages, check them, and give them its tools."""
    if not isinstance(messages, list):
        return checked(messages, where=where, unused=unused)  # which refuses it
    if is_given(history := record.get("history")):
        if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
            raise ValueError(f"{where}: history must be a list of [question, answer]; got {repr(history)[:60]}.")
        roles = ("user", "assistant")
        before = [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn, strict=True)]
        systems = _systems(messages)
        messages = [*systems, *before, *(m for m in messages if m not in systems)]
    for name in SYSTEM_FIELDS:
        if is_given(record.get(name)):
            messages = _with_system([{"role": "system", "content": record[name]}], messages, where=where)
    read = checked(messages, where=where, unused=unused)
    return with_tools(read, record.get("tools") or [], where=where)
