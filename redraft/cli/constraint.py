"""Flags that say what generated text must be."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redraft.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ConstraintArguments(Settings):
    """What every new text must be. Of several flags all hold."""

    regex: str | None = None
    """Regular expression that the whole text matches."""
    json_schema: str | None = None
    """JSON schema that the text fits: a file, or the schema itself."""
    choice: tuple[str, ...] = ()
    """Options of which the text is one."""

    def constraint(self) -> Any:
        """Build the constraint; None where nothing is asked for. Raises ValueError for a file that cannot be read."""
        from redraft.constraints.kinds import All, Choice, Constraint, JsonSchema, Regex

        parts: list[Constraint] = [] if self.regex is None else [Regex(self.regex)]
        if self.json_schema is not None:
            parts.append(JsonSchema(_schema_text(self.json_schema)))
        if self.choice:
            parts.append(Choice(self.choice))
        return All(parts=tuple(parts)) if parts else None


def _schema_text(given: str) -> str:
    from redraft.constraints.schema import MAX_CHARACTERS

    if _is_json(given):
        return given
    try:
        with Path(given).open(encoding="utf-8") as file:
            return file.read(MAX_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it names no text file in UTF-8"
        raise ValueError(
            f"json_schema must be a schema or a file that holds one; got {given!r:.200}: {reason}."
        ) from error


def _is_json(given: str) -> bool:
    """Tell a schema from the name of a file. A text that begins with { is a schema, so that its errors are named."""
    try:
        json.loads(given)
    except RecursionError:
        return True
    except ValueError:
        return given.lstrip().startswith("{")
    return True
