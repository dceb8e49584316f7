"""The OpenAI API without HTTP: JSON bodies become checked calls, and the engine's deltas become JSON objects. No torch.

Every field is honoured, accepted because its value changes nothing, or refused with its name (docs/serving.md).
"""

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any

from redraft import __version__
from redraft.constraints.kinds import All, Choice, Constraint, JsonSchema, Regex
from redraft.errors import check_names, unknown_name
from redraft.sampling.config import Share
from redraft.sampling.presets import PRESETS
from redraft.serving.request import Delta, TokenLogprob, Usage
from redraft.settings import MAX_COUNT, Count, NonNegative, Positive, Within, check_field, fits

MAX_CHOICES = 128
"""Texts that one request may ask for: prompts times n."""
MAX_MESSAGES = 1024
MAX_STOPS = 16
MAX_PATTERN_BYTES = 4 << 10
MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 16
MAX_TOKEN_CHARACTERS = 32
"""Longer texts, for each token of the context, are refused before they are tokenized: that takes seconds per MiB."""
FINGERPRINT = f"redraft-{__version__}"


class ApiError(Exception):
    """What a client is told: an HTTP status and OpenAI's error object."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def server_error(message: str) -> ApiError:
    """Make the error for what is no mistake of the client; the same request is not to be sent again."""
    return ApiError(message, status=500, kind="server_error", headers={"x-should-retry": "false"})


def retry_later(message: str, seconds: int = 1, *, status: int = 503) -> ApiError:
    """Make the error for what another try may do: 503, or 429 where there is too much to do."""
    kind = "server_error" if status == 503 else "rate_limit_exceeded"
    return ApiError(message, status=status, kind=kind, code=kind, headers={"Retry-After": str(seconds)})


@dataclass(frozen=True, kw_only=True)
class Call:
    """A checked request: what to prepare, and how to answer."""

    endpoint: str
    model: str | None
    prompts: list[Any]
    """Lists of messages, texts or lists of token ids; of `infill` one list of texts and sizes of holes."""
    settings: dict[str, Any]
    """Of `SamplingConfig`."""
    constraint: Constraint | None = None
    options: tuple[str, ...] = ()
    """Answers to decide between by their likelihood, instead of a text to generate."""
    suffix: str | None = None
    hole_ids: tuple[str, ...] = ()
    does_echo: bool = False
    top_logprobs: int | None = None
    is_streamed: bool = False
    has_usage: bool = False
    has_running_usage: bool = False
    wants_drafts: bool = False
    deadline_seconds: float | None = None


Texts = list[str]
Object = dict[str, Any]
_SHARED: Object = {
    "model": str | None, "max_tokens": Count | None, "temperature": NonNegative | None, "top_p": Share | None,
    "seed": Annotated[int, Within(f"[{-(2**63)}, {2**63})")] | None, "stop": str | Texts | None,
    "ignore_eos": bool | None, "n": Annotated[int, Within(f"[1, {MAX_CHOICES}]")] | None, "stream": bool | None,
    "stream_options": dict | None, "response_format": dict | None, "redraft": dict | None,
}  # fmt: skip
_CHAT: Object = {
    "messages": list, "max_completion_tokens": Count | None, "logprobs": bool | None,
    "top_logprobs": Annotated[int, Within("[0, 20]")] | None,
}  # fmt: skip
_COMPLETIONS: Object = {
    "prompt": str | list, "suffix": str | None, "echo": bool | None,
    "logprobs": Annotated[int, Within("[0, 5]")] | None,
}  # fmt: skip
_INFILL = {name: _SHARED[name] for name in ("model", "temperature", "top_p", "seed", "stream", "redraft")}
_TYPES: dict[str, Object] = {
    "chat": _SHARED | _CHAT,
    "completions": _SHARED | _COMPLETIONS,
    "infill": _INFILL | {"segments": list, "constraint": dict | None},
}
"""Fields that are honoured, by endpoint."""
_SAMPLER = "Use temperature, top_p or a preset in redraft"
_NO_TOOLS = "Tools are not served; ask for JSON with response_format"
_NO_TEMPLATE = "The template of the model's folder is used"
_IDENTITY: dict[str, tuple[tuple[Any, ...], str]] = {
    "presence_penalty": ((0,), _SAMPLER),
    "frequency_penalty": ((0,), _SAMPLER),
    "repetition_penalty": ((1,), _SAMPLER),
    "logit_bias": (({},), "Use a constraint: response_format, or regex or choice in redraft"),
    "min_p": ((0,), _SAMPLER),
    "min_tokens": ((0,), "Use ignore_eos, or a constraint"),
    "stop_token_ids": (([],), "Use stop"),
    "bad_words": (([],), "Use a constraint"),
    "prompt_logprobs": ((), "Use `redraft eval` for likelihoods"),
    "chat_template": ((), _NO_TEMPLATE),
    "chat_template_kwargs": (({},), _NO_TEMPLATE),
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "audio": ((), "Only text is served"),
    "modalities": ((["text"],), "Only text is served"),
    "prediction": ((), "Leave it out"),
    "web_search_options": ((), "Leave it out"),
    "store": ((False,), "Nothing is stored"),
    "service_tier": (("auto", "default"), "There is one tier"),
}
"""Fields that are accepted with null and with these values, which change nothing; and what to use for other values."""
_WITHOUT_EFFECT: Object = {
    "user": str | None, "metadata": dict | None, "safety_identifier": str | None, "prompt_cache_key": str | None,
    "parallel_tool_calls": bool | None,
}  # fmt: skip
_EXTRA_SETTINGS = (
    "preset", "steps", "steps_per_block", "block_size", "threshold", "factor", "entropy_bound", "alg_temperature",
    "top_k", "budget", "forwards", "editing_threshold", "entropy_threshold",
)  # fmt: skip
"""Names of `SamplingConfig` in the object `redraft`."""
_EXTRAS: Object = {
    "deadline_ms": Positive | None, "drafts": bool | None, "regex": str | None, "choice": Texts | None,
    "decide": bool | None,
}  # fmt: skip
_MESSAGE_FIELDS = ("role", "content")
_ROLES = ("system", "developer", "user", "assistant", "tool")


def parse_json(raw: bytes) -> Object:
    """Read a body: a JSON object in UTF-8 with each name once, finite numbers and whole characters."""

    def unique(pairs: list[tuple[str, Any]]) -> Object:
        read = dict(pairs)
        if len(read) < len(pairs):
            raise ApiError("the body must be JSON that has each name of an object once.")
        return read

    def no_constant(name: str) -> None:
        raise ApiError(f"the body must be JSON, which has no {name}.")

    try:
        body = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
        if rb"\u" in raw:
            json.dumps(body, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no character
    except UnicodeError as error:
        raise ApiError("the body must be UTF-8, without halves of surrogate pairs.") from error
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is too deep, or holds too long a number"
        raise ApiError(f"the body must be JSON: {reason}.") from error
    if not isinstance(body, dict):
        raise ApiError(f"the body must be a JSON object; got {type(body).__name__}.")
    return body


def checked(param: str | None, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call, and turn a ValueError into a refusal that names the field."""
    try:
        return work(*arguments)
    except ValueError as error:
        raise ApiError(str(error)[:2000], param=param) from error


def check_size(prompt: Any, limit: int | None) -> None:
    """Refuse a text, token ids, messages or segments that cannot fit into so many tokens. Raises ApiError."""
    if limit is None:
        return
    parts = (
        [prompt] if isinstance(prompt, str) else [one["content"] if isinstance(one, dict) else one for one in prompt]
    )
    texts = [one for one in parts if isinstance(one, str)]
    size, most, unit = sum(map(len, texts)), MAX_TOKEN_CHARACTERS * limit, "characters"
    if not texts:
        size, most, unit = len(parts), limit, "tokens"
    if size > most:
        problem = f"the text must have at most {most} {unit} in a context of {limit} tokens; got {size}. Shorten it."
        raise ApiError(problem, code="context_length_exceeded")


def read_call(endpoint: str, body: Object, *, template: str | None = None) -> Call:
    """Check a body's fields. `template`: the model's chat template, which says what roles it renders."""
    types = _TYPES[endpoint]
    given = _fields(endpoint, body)
    extras = _extras(given.get("redraft") or {})
    prompts, hole_ids = _prompts(endpoint, given, template)
    settings = {name: extras[name] for name in _EXTRA_SETTINGS if name in extras} | _settings(given)
    if len(prompts) * settings.get("num_samples", 1) > MAX_CHOICES:
        raise ApiError(f"prompts times n must be at most {MAX_CHOICES}.", param="n")
    is_streamed = bool(given.get("stream"))
    options = _stream_options(given, is_streamed=is_streamed)
    if endpoint == "infill" and is_streamed:
        raise ApiError("infilling is not streamed; leave stream out.", param="stream")
    if extras.get("drafts") and not is_streamed:
        raise ApiError("drafts are events of a stream: set stream to true, too.", param="redraft.drafts")
    if given.get("echo") and given.get("logprobs") is not None:
        problem = "a diffusion model has no log probabilities of single tokens of a prompt. Use `redraft eval`."
        raise ApiError(problem, param="echo")
    constraint = _constraint(given, extras)
    if constraint is not None and isinstance(settings.get("stop"), tuple):
        raise ApiError("stop would cut a text that response_format or redraft constrains; leave it out.", param="stop")
    deadline = extras.get("deadline_ms")
    return Call(
        endpoint=endpoint,
        model=given.get("model"),
        prompts=prompts,
        settings=settings,
        constraint=constraint,
        options=_options(given, extras, constraint, num_prompts=len(prompts)) if extras.get("decide") else (),
        suffix=given.get("suffix") if "suffix" in types else None,
        hole_ids=hole_ids,
        does_echo=bool(given.get("echo")),
        top_logprobs=_top_logprobs(endpoint, given),
        is_streamed=is_streamed,
        has_usage=bool(options.get("include_usage")),
        has_running_usage=bool(options.get("continuous_usage_stats")),
        wants_drafts=bool(extras.get("drafts")),
        deadline_seconds=None if deadline is None else deadline / 1000,
    )


def read_fields(body: Object, types: Object, others: Sequence[str] = ()) -> Object:
    """Check a body's fields by their types; one that may not be null must be there. Others are known, but not read."""
    for name, value in body.items():
        if name not in types and name not in others:
            error = unknown_name("field", name[:100], [*types, *others])
            raise ApiError(str(error), param=name[:100], code="unknown_parameter")
        if name in types:
            checked(name, check_field, name, value, types[name])
    for name, kind in types.items():
        if name not in body and not fits(None, kind):
            raise ApiError(f"{name} is missing.", param=name)
    return {name: value for name, value in body.items() if name in types}


def _fields(endpoint: str, body: Object) -> Object:
    """Return the fields that are honoured; refuse unknown ones, wrong types, and values that would be ignored."""
    given = read_fields(body, _TYPES[endpoint] | _WITHOUT_EFFECT, [*_IDENTITY, "best_of"])
    for name in _IDENTITY.keys() & body.keys():
        _check_identity(name, body[name], body)
    if body.get("best_of") not in (None, body.get("n") or 1):
        raise ApiError(f"best_of must equal n; got {body['best_of']!r:.100}.", param="best_of")
    return given


def _check_identity(name: str, value: Any, body: Object) -> None:
    values, instead = _IDENTITY[name]
    if value is None or (name == "tools" and body.get("tool_choice") == "none"):
        return
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
        allowed = ", ".join(["null", *(json.dumps(one) for one in values)])
        raise ApiError(f"{name} must be {allowed}; got {value!r:.100}. {instead}.", param=name)


def _extras(given: Object) -> Object:
    """Check the object `redraft`, whose names but four are those of `SamplingConfig`."""
    known = (*_EXTRA_SETTINGS, *_EXTRAS)
    for name, value in given.items():
        param = f"redraft.{name[:100]}"
        checked(param, check_names, "field of redraft", [name[:100]], known)
        if name in _EXTRAS:
            checked(param, check_field, param, value, _EXTRAS[name])
    chosen = {name: value for name, value in given.items() if value is not None}
    preset = chosen.get("preset")
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):  # MODULE:NAME would run code
        raise ApiError(str(unknown_name("preset", str(preset)[:100], PRESETS)), param="redraft.preset")
    return chosen


def _settings(given: Object) -> Object:
    """Name the fields as `SamplingConfig` does. Without a seed one is drawn."""
    lengths = {given[name] for name in ("max_tokens", "max_completion_tokens") if given.get(name) is not None}
    if len(lengths) > 1:
        raise ApiError("max_tokens and max_completion_tokens must be equal where both are given.", param="max_tokens")
    settings: Object = {name: given[name] for name in ("temperature", "top_p") if given.get(name) is not None}
    settings["seed"] = secrets.randbits(31) if given.get("seed") is None else given["seed"]
    if lengths:
        settings["max_new_tokens"] = lengths.pop()
    if given.get("n") is not None:
        settings["num_samples"] = given["n"]
    stop = given.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS or not all(stops):
        raise ApiError(f"stop takes up to {MAX_STOPS} strings, none of them empty.", param="stop")
    if stops and given.get("ignore_eos"):
        raise ApiError("ignore_eos and stop cannot be combined: a text that stop ends also ends at EOS.", param="stop")
    if stops:
        settings["stop"] = tuple(stops)
    if given.get("ignore_eos"):
        settings["stop"] = None
    return settings


def _stream_options(given: Object, *, is_streamed: bool) -> Object:
    options = given.get("stream_options") or {}
    known = ("include_usage", "continuous_usage_stats", "include_obfuscation")
    checked("stream_options", check_names, "field of stream_options", [name[:100] for name in options], known)
    for name, value in options.items():
        checked(f"stream_options.{name}", check_field, f"stream_options.{name}", value, bool | None)
    if options.get("include_obfuscation"):
        raise ApiError("there is no obfuscation; leave it out.", param="stream_options.include_obfuscation")
    if options and not is_streamed:
        raise ApiError("stream_options is for streams: set stream to true, or leave it out.", param="stream_options")
    return options


def _top_logprobs(endpoint: str, given: Object) -> int | None:
    if endpoint == "completions":
        return given.get("logprobs")
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise ApiError("top_logprobs needs logprobs: true.", param="top_logprobs")
    return (given.get("top_logprobs") or 0) if given.get("logprobs") else None


def _constraint(given: Object, extras: Object) -> Constraint | None:
    """Build what the text must be; of several constraints all hold."""
    parts: list[Constraint] = []
    of_infill = given.get("constraint") or {}
    checked("constraint", check_names, "constraint", [name[:100] for name in of_infill], ("regex", "choice", "schema"))
    for param, source in (("redraft", extras), ("constraint", of_infill)):
        if source.get("regex") is not None:
            parts.append(_regex(f"{param}.regex", source["regex"]))
        if source.get("choice") is not None:
            parts.append(_choice(f"{param}.choice", source["choice"]))
    if "schema" in of_infill:
        parts.append(_schema("constraint.schema", of_infill["schema"]))
    response_format = given.get("response_format")
    if response_format is not None:
        parts += _response_format(response_format)
    return parts[0] if len(parts) == 1 else All(parts=tuple(parts)) if parts else None


def _options(given: Object, extras: Object, constraint: Constraint | None, *, num_prompts: int) -> tuple[str, ...]:
    """List the answers to decide between: those of `choice`, or the values of a schema that lists them."""
    if "segments" in given or num_prompts > 1 or isinstance(constraint, All):
        raise ApiError("decide takes one prompt and one constraint, and fills no holes.", param="redraft.decide")
    options = extras.get("choice")
    if options is None:
        schema = ((given.get("response_format") or {}).get("json_schema") or {}).get("schema")
        schema = schema if isinstance(schema, dict) else {}
        values = [False, True] if schema == {"type": "boolean"} else schema.get("enum")
        options = [json.dumps(value, ensure_ascii=False) for value in values or ()]
    if not 2 <= len(set(options)) == len(options) <= MAX_CHOICES or "" in options:
        problem = f"decide takes 2 to {MAX_CHOICES} answers, none empty or twice: choice, or an enum or boolean schema."
        raise ApiError(problem, param="redraft.decide")
    others = [name for name in ("suffix", "logprobs", "echo") if given.get(name) not in (None, False, "")]
    others += [name for name in ("drafts", "deadline_ms") if extras.get(name)]
    if others or given.get("n") not in (None, 1):
        raise ApiError(f"decide gives one answer: leave {', '.join(others or ['n'])} out.", param="redraft.decide")
    return tuple(options)


def _regex(param: str, pattern: Any) -> Constraint:
    if not isinstance(pattern, str) or len(pattern.encode()) > MAX_PATTERN_BYTES:
        raise ApiError(f"{param} must be a text of at most {MAX_PATTERN_BYTES} bytes.", param=param)
    return checked(param, Regex, pattern)


def _choice(param: str, options: Any) -> Constraint:
    if len(json.dumps(options)) > MAX_SCHEMA_BYTES:
        raise ApiError(f"{param} must have at most {MAX_SCHEMA_BYTES} bytes.", param=param)
    return checked(param, Choice, options)


def _schema(param: str, schema: Any) -> Constraint:
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise ApiError(f"a schema must have at most {MAX_SCHEMA_BYTES} bytes.", param=param)
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise ApiError(f"a schema must be nested at most {MAX_SCHEMA_DEPTH} deep.", param=param)
    if not isinstance(schema, dict | bool):
        raise ApiError("a schema must be an object or a boolean.", param=param)
    return checked(param, JsonSchema, schema)


def _depth(value: Any) -> int:
    """Count the objects and arrays around the deepest value, level by level."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else one)]
    return depth


def _response_format(given: Object) -> list[Constraint]:
    kind, name = given.get("type"), "response_format"
    if kind not in ("text", "json_object", "json_schema"):
        raise ApiError(f"{name}.type must be text, json_object or json_schema; got {kind!r:.100}.", param=name)
    allowed = ("type", "json_schema") if kind == "json_schema" else ("type",)
    checked(name, check_names, f"field of {name}", [key[:100] for key in given], allowed)
    if kind == "text":
        return []
    if kind == "json_object":
        return [JsonSchema({"type": "object"})]
    inner = given.get("json_schema")
    if not isinstance(inner, dict) or "schema" not in inner:
        raise ApiError(f"{name}.json_schema must be an object that holds the schema.", param=name)
    names = ("name", "description", "schema", "strict")
    checked(name, check_names, "field of json_schema", [key[:100] for key in inner], names)
    return [_schema(name, inner["schema"])]


def _prompts(endpoint: str, given: Object, template: str | None) -> tuple[list[Any], tuple[str, ...]]:
    if endpoint == "chat":
        return [read_messages(given["messages"], template)], ()
    if endpoint == "infill":
        return _segments(given["segments"])
    prompt = given["prompt"]
    prompts = [prompt] if isinstance(prompt, str) or (prompt and is_ids(prompt)) else prompt
    if not prompts or not all(isinstance(one, str) or is_ids(one) for one in prompts):
        raise ApiError("prompt must be a text, token ids, or a list of these.", param="prompt")
    if given.get("suffix") and len(prompts) > 1:
        raise ApiError(f"a suffix takes one prompt; got {len(prompts)}.", param="suffix")
    return list(prompts), ()


def is_ids(value: Any, limit: int = 2**31) -> bool:
    """Tell whether a value is a list of token ids. A million of them take no time that others would notice."""
    return (
        isinstance(value, list)
        and set(map(type, value)) <= {int}
        and (not value or 0 <= min(value) <= max(value) < limit)
    )


def read_messages(messages: list[Any], template: str | None) -> list[Object]:
    """Check chat messages. A role that the template does not name is refused; developer becomes system."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise ApiError(f"messages must hold 1 to {MAX_MESSAGES} messages; got {len(messages)}.", param="messages")
    return [_message(f"messages[{i}]", message, template or "") for i, message in enumerate(messages)]


def _message(param: str, message: Any, template: str) -> Object:
    if not isinstance(message, dict):
        raise ApiError(f"{param} must be an object with role and content.", param=param)
    given = {name: value for name, value in message.items() if value not in (None, [])}
    checked(param, check_names, f"field of {param}", [name[:100] for name in given], _MESSAGE_FIELDS)
    role, content = given.get("role"), given.get("content", "")
    if role not in _ROLES:
        raise ApiError(f"{param}.role must be one of {', '.join(_ROLES)}; got {role!r:.100}.", param=f"{param}.role")
    is_known = f"'{role}'" in template or f'"{role}"' in template
    if role == "developer" and not is_known:
        role = "system"
    if role == "tool" and not is_known:
        raise ApiError("the model's chat template does not render the role tool.", param=f"{param}.role")
    if isinstance(content, list):
        content = "".join(_text_part(f"{param}.content", part) for part in content)
    if not isinstance(content, str):
        raise ApiError(f"{param}.content must be a text or a list of text parts.", param=f"{param}.content")
    return {"role": role, "content": content}


def _text_part(param: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ApiError(f"{param} takes parts of type text only; nothing is fetched or seen.", param=param)
    return str(part["text"])


def _segments(segments: list[Any]) -> tuple[list[Any], tuple[str, ...]]:
    """Read texts and holes: {"mask": number of tokens, "id": name}."""
    row: list[Any] = []
    ids: list[str] = []
    for i, segment in enumerate(segments):
        param = f"segments[{i}]"
        if isinstance(segment, str):
            row.append(segment)
            continue
        if not isinstance(segment, dict):
            raise ApiError(f"{param} must be a text or a hole like {{'mask': 8}}.", param=param)
        checked(param, check_names, f"field of {param}", [name[:100] for name in segment], ("mask", "id"))
        checked(param, check_field, f"{param}.mask", segment.get("mask"), Count)
        checked(param, check_field, f"{param}.id", segment.get("id", ""), str)
        row.append(segment["mask"])
        ids.append(segment.get("id", str(len(ids))))
    if sum(one for one in row if isinstance(one, int)) > MAX_COUNT:
        raise ApiError(f"the holes take at most {MAX_COUNT} tokens together.", param="segments")
    if not ids or len(set(ids)) < len(ids):
        raise ApiError("segments must hold a hole like {'mask': 8}, and each id once.", param="segments")
    return [row], tuple(ids)


@dataclass(kw_only=True)
class Row:
    """What is known of one text of an answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    finish_reason: str | None = None
    num_sent: int = 0
    """Log probabilities that were sent."""
    offset: int = 0
    """Characters of the tokens whose log probabilities were sent."""
    is_begun: bool = False


class Reply:
    """The answer to one call, as the deltas tell it: chunks of a stream, or one object at the end."""

    def __init__(
        self,
        call: Call,
        *,
        id: str,
        model: str,
        num_rows: int,
        text_of: Callable[[int], str],
        echoes: Sequence[str] = (),
        fill: Callable[[list[int]], list[str]] | None = None,
    ) -> None:
        """`text_of` decodes a token; `echoes` are the prompts to repeat; `fill` decodes what stands in each hole."""
        is_chat = call.endpoint == "chat"
        self.call, self.rows, self.echoes = call, [Row() for _ in range(num_rows)], echoes
        self.scores: list[Object] = []
        """Of a decision: each option with its probability."""
        self._text_of, self._fill = text_of, fill
        id, kind = f"{'chatcmpl' if is_chat else 'cmpl'}-{id}", "chat.completion" if is_chat else "text_completion"
        now = {"created": int(time.time()), "model": model, "system_fingerprint": FINGERPRINT}
        self.head: Object = {"id": id, "object": kind} | now

    @property
    def is_done(self) -> bool:
        return all(row.finish_reason for row in self.rows)

    def add(self, delta: Delta) -> str:
        """Note what a tick decided, and return the text that it adds. Raises ApiError if the row failed."""
        row = self.rows[delta.index]
        if delta.finish_reason == "error":
            raise server_error(delta.error or "the engine failed on this request.")
        row.token_ids += delta.token_ids
        row.logprobs += delta.logprobs or ()
        row.usage, row.finish_reason = delta.usage, delta.finish_reason
        text = delta.text
        if self._fill is not None:  # the engine's text of an infilled row is the whole one, given parts included
            text = "".join(self._fill(row.token_ids)) if row.finish_reason else ""
        row.text += text
        return text

    def chunks(self, delta: Delta) -> Iterator[Object]:
        """Note a delta, and yield what a stream tells of it: a chunk where there is new text, and the draft."""
        text, row = self.add(delta), self.rows[delta.index]
        usage = self.usage() if self.call.has_running_usage else None
        if text or row.finish_reason is not None:
            shown = text if row.is_begun or not self.echoes else self.echoes[delta.index] + text
            choice: Object = {"index": delta.index, "finish_reason": row.finish_reason}
            if self.call.endpoint == "chat":
                choice["delta"] = ({} if row.is_begun else {"role": "assistant"}) | {"content": shown}
            else:
                choice["text"] = shown
            choice["logprobs"] = self._logprobs(row)
            row.is_begun = True
            yield self._chunk([choice], usage)
        if delta.draft is not None:  # without choices, so that benchmarks do not count it as text
            draft = vars(delta.draft) | {"index": delta.index, "tokens": [list(one) for one in delta.draft.tokens]}
            yield self._chunk([], usage) | {"draft": draft}

    def last_chunk(self) -> Iterator[Object]:
        """Yield the chunk that holds the usage, if it was asked for."""
        if self.call.has_usage:
            yield self._chunk([], self.usage())

    def _chunk(self, choices: list[Object], usage: Object | None = None) -> Object:
        is_chat = self.call.endpoint == "chat"
        chunk = self.head | ({"object": "chat.completion.chunk"} if is_chat else {}) | {"choices": choices}
        return chunk | {"usage": usage} if self.call.has_usage or usage else chunk

    def whole(self) -> Object:
        """Make the answer that is not streamed."""
        if self.call.endpoint == "infill":
            return self._infilled()
        choices = []
        for i, row in enumerate(self.rows):
            text = (self.echoes[i] if self.echoes else "") + row.text
            choice: Object = {"index": i, "finish_reason": row.finish_reason, "logprobs": self._logprobs(row)}
            if self.call.endpoint == "chat":
                choices.append(choice | {"message": {"role": "assistant", "content": text, "refusal": None}})
            else:
                choices.append(choice | {"text": text})
        return self.head | {"choices": choices, "usage": self.usage()}

    def _infilled(self) -> Object:
        """Put the texts of the holes between the given ones."""
        assert self._fill is not None  # it is there for this endpoint
        tokens, texts = iter(self.rows[0].token_ids), iter(self._fill(self.rows[0].token_ids))
        filled, holes, ids = [], [], iter(self.call.hole_ids)
        for segment in self.call.prompts[0]:
            filled.append(segment if isinstance(segment, str) else next(texts))
            if isinstance(segment, int):
                holes.append({"id": next(ids), "text": filled[-1], "tokens": list(islice(tokens, segment))})
        return self.head | {"object": "infill", "text": "".join(filled), "holes": holes, "usage": self.usage()}

    def usage(self) -> Object:
        """Add up the rows. The samples of one prompt share it."""
        usages = [row.usage for row in self.rows]
        firsts = usages[:: self.call.settings.get("num_samples", 1)]
        prompt, new = sum(one.prompt_tokens for one in firsts), sum(one.completion_tokens for one in usages)
        forwards, most = sum(one.forwards for one in usages), max(one.forwards for one in usages)
        extras = {"seed": self.call.settings["seed"], "forwards": most}
        extras |= {"options": self.scores} if self.scores else {
            "query_tokens": sum(one.query_tokens for one in usages),
            "tokens_per_forward": round(new / forwards, 3) if forwards else None,
            "queue_ms": round(1000 * max(one.queue_seconds for one in usages), 1),
        }  # fmt: skip
        cached = {"cached_tokens": sum(one.cached_tokens for one in firsts)}
        counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return counts | {"prompt_tokens_details": cached, "redraft": extras}

    def _logprobs(self, row: Row) -> Object | None:
        """Tell the log probabilities that were not sent yet, each of the step that placed its token."""
        if self.call.top_logprobs is None:
            return None
        new, row.num_sent = row.logprobs[row.num_sent :], len(row.logprobs)
        if self.call.endpoint == "chat":
            content = [self._named(one.token_id, one.logprob) | {"top_logprobs": self._tops(one)} for one in new]
            return {"content": content, "refusal": None}
        texts, offsets = [self._text_of(one.token_id) for one in new], []
        for text in texts:
            offsets.append(row.offset)
            row.offset += len(text)
        tops = [{self._text_of(id): logprob for id, logprob in one.top} for one in new]
        logprobs = [one.logprob for one in new]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _named(self, token_id: int, logprob: float) -> Object:
        text = self._text_of(token_id)
        whole = None if "\ufffd" in text else list(text.encode())  # a part of a character has no text
        return {"token": text, "logprob": logprob, "bytes": whole}

    def _tops(self, one: TokenLogprob) -> list[Object]:
        return [self._named(token_id, logprob) for token_id, logprob in one.top]
