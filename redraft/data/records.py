"""Records of chat and preference data, whatever their fields are called, as conversations of one form."""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

from redraft.data.files import require_text

logger = logging.getLogger(__name__)

Kind = Literal["text", "chat", "preference"]
Message = dict[str, str]
DOCUMENT = "\0document"
"""Role of the one message that is no turn but plain text, beside conversations; a name that no template has."""

CHAT_SCHEMAS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/response": ("prompt", "response"),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
}
PREFERENCE_SCHEMAS: dict[str, tuple[str, ...]] = {
    "prompt/chosen/rejected": ("prompt", "chosen", "rejected"),
    "chosen/rejected": ("chosen", "rejected"),
}


def record_parser(kind: Kind, *, skip_bad: bool = False) -> Callable[[str, Any], str | None]:
    """Make the parser of one source: a record to the JSON of its messages (chat) or of two conversations (preference).

    The first record decides the schema. Raises ValueError at the first record that has another, and at a malformed one
    unless `skip_bad`: then it gives None, and a warning for the first.
    """
    schemas = CHAT_SCHEMAS if kind == "chat" else PREFERENCE_SCHEMAS
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
            return json.dumps(read(record, schema, where=where), ensure_ascii=False)
        except ValueError as error:
            if not skip_bad:
                raise
            if not is_warned:
                logger.warning("Skipped a record, and skip others like it: %s", error)
            is_warned = True
            return None

    return parse


def as_conversation(document: str) -> str:
    """Return the JSON of plain text that is mixed with conversations."""
    return json.dumps([{"role": DOCUMENT, "content": document}], ensure_ascii=False)


def _schema_of(record: Any, schemas: Mapping[str, tuple[str, ...]], *, where: str) -> str:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a record must be an object; got {type(record).__name__}. Wrap it.")
    for name, fields in schemas.items():
        if all(record.get(field) is not None for field in fields):  # tables fill absent fields with null
            return name
    raise ValueError(
        f"{where}: no known schema; it has {', '.join(sorted(map(str, record)))}. Known are {', '.join(schemas)}."
    )


def _conversation(record: Mapping[str, Any], schema: str, *, where: str) -> list[Message]:
    if schema == "messages":
        return _checked(record["messages"], where=where)
    question_field, answer_field = CHAT_SCHEMAS[schema]
    question, answer = record[question_field], record[answer_field]
    if schema == "instruction/output" and record.get("input"):
        question = f"{question}\n\n{record['input']}"
    return _checked([*_as_messages(question, "user"), *_as_messages(answer, "assistant")], where=where)


def _pair(record: Mapping[str, Any], schema: str, *, where: str) -> list[list[Message]]:
    prompt = _as_messages(record["prompt"], "user") if schema.startswith("prompt") else []
    answers = [_as_messages(record[name], "assistant") for name in ("chosen", "rejected")]
    chosen, rejected = (_checked([*prompt, *answer], where=where) for answer in answers)
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(f"{where}: chosen and rejected must answer the same prompt. Mend or remove it.")
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are the same answer. Mend or remove it.")
    return [chosen, rejected]


def _as_messages(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _checked(messages: Any, *, where: str) -> list[Message]:
    """Return role and content of the messages up to the last assistant turn, after which nothing is learnt."""
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise ValueError(f'{where}: messages must be a list of {{"role": ..., "content": ...}}. Mend or remove it.')
    for number, message in enumerate(messages, start=1):
        content = message.get("content")
        if not isinstance(content, str):
            got = type(content).__name__
            raise ValueError(
                f"{where}: the content of message {number} must be a string; got {got}. Mend or remove it."
            )
        require_text(content, "content", where=f"{where}, message {number}")
        if message["role"] == "assistant" and not content.strip():
            raise ValueError(f"{where}: message {number} is an empty assistant turn. Mend or remove it.")
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"{where}: no assistant turn, so all of it would be left out of the loss. Mend or remove it.")
    return [{"role": m["role"], "content": m["content"]} for m in messages[: last + 1]]
