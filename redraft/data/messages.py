"""Messages of a conversation: the fields that are used, and what is wrong with the others."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from redraft.data.files import require_text

Message = dict[str, Any]
"""Role, content, and where they are there: thoughts, tool calls, weight 0; the first message has the tools."""
DOCUMENT = "\0document"
"""Role of the one message that is no turn but plain text, beside conversations; a name that no record may have."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
MASKS = ("weight", "train", "training", "loss")
"""What OpenAI's files and other frameworks call it: 0 or false for an answer that is given and not learnt."""
ANSWERED = ("system", "developer", "user", "tool", "function")
"""Roles that may follow the last answer."""


def is_given(value: Any) -> bool:
    """Say whether a field holds anything; tables fill absent fields with null or nothing."""
    return value is not None and value not in ("", [], {})


def checked(messages: Any, *, where: str, unused: Counter[str]) -> list[Message]:
    """Return the messages up to the last answer to be learnt, with the fields that are used; count the others.

    Raises ValueError for what is malformed, and where there is no answer.
    """
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise ValueError(f'{where}: messages must be a list of {{"role": ..., "content": ...}}. Mend or remove it.')
    read = [_message(m, number=i, where=where, unused=unused) for i, m in enumerate(messages, start=1)]
    answers = [i for i, message in enumerate(read) if message["role"] == "assistant"]
    learnt = [i for i in answers if "weight" not in read[i]]
    if not learnt:
        why = "every assistant turn has weight 0" if answers else "no assistant turn"
        raise ValueError(f"{where}: {why}, so all of it would be left out of the loss. Mend or remove it.")
    for message in read[answers[-1] + 1 :]:
        if message["role"] not in ANSWERED:
            raise ValueError(
                f"{where}: a message of role {message['role']!r} follows the last answer and would be left out."
                " Answers have role assistant."
            )
    return read[: learnt[-1] + 1]


def _message(message: Mapping[str, Any], *, number: int, where: str, unused: Counter[str]) -> Message:
    role, here = message["role"], f"{where}, message {number}"
    if not (isinstance(role, str) and re.fullmatch(r"[\w .-]+", role)):
        raise ValueError(f"{here}: role must be a name such as user; got {role!r}. Mend or remove it.")
    read: Message = {"role": role, "content": message.get("content")}
    if role == "assistant":
        read |= {name: _text(message[name], name, here=here) for name in THOUGHTS if is_given(message.get(name))}
        if is_given(message.get("tool_calls")):
            read["tool_calls"] = _tool_calls(message["tool_calls"], here=here)
            read["content"] = read["content"] or ""
        if not all(_is_learnt(message, name, here=here) for name in MASKS):
            read["weight"] = 0
    if role == "tool":
        read |= {name: message[name] for name in ("name", "tool_call_id") if is_given(message.get(name))}
    if not isinstance(content := read["content"], str):
        got = type(content).__name__
        raise ValueError(f"{where}: the content of message {number} must be a string; got {got}. Mend or remove it.")
    require_text(content, "content", where=here)
    if role == "assistant" and not content.strip() and "tool_calls" not in read:
        raise ValueError(f"{where}: message {number} is an empty assistant turn. Mend or remove it.")
    for name in message.keys() - read.keys():
        if is_given(message[name]) and not (name in MASKS and (role == "assistant" or message[name] == 0)):
            unused[f"{name} of {role} messages"] += 1
    return read


def _text(value: Any, name: str, *, here: str) -> str:
    text = require_text(value, name, where=here)
    assert text is not None  # is_given
    return text


def _is_learnt(message: Mapping[str, Any], name: str, *, here: str) -> bool:
    value = message.get(name)
    if value not in (None, 0, 1):
        raise ValueError(f"{here}: {name} must be 0 or 1; got {value!r}. Other weights of a loss are not supported.")
    return value != 0


def _parsed(value: Any, name: str, *, here: str) -> Any:
    """Read JSON in a string, which is how tables and OpenAI's files hold objects without one form."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{here}: {name} is not JSON ({error}). Mend or remove it.") from error


def _tool_calls(calls: Any, *, here: str) -> list[dict[str, Any]]:
    """Return calls whose arguments are objects: templates write them as JSON themselves."""
    calls = _parsed(calls, "tool_calls", here=here)
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'{here}: tool_calls must be a list of {{"function": {{"name": ..., "arguments": ...}}}}; got'
                f" {_excerpt(call)}. Mend or remove it."
            )
        arguments = _parsed(function.get("arguments") or {}, "the arguments of a tool call", here=here)
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read


def with_tools(messages: list[Message], tools: Any, *, where: str) -> list[Message]:
    """Put the tools of a record into its first message."""
    tools = _parsed(tools, "tools", here=where)
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"{where}: tools must be a list of functions' JSON schemas; got {_excerpt(tools)}. Mend it.")
    return [messages[0] | {"tools": list(tools)}, *messages[1:]] if tools else messages


def _excerpt(value: Any) -> str:
    return repr(value)[:60]
