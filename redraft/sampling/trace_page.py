"""Render a trace of sampling as one self-contained HTML page that replays the denoising step by step."""

import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

KINDS = ("commit", "revise", "reopen")


def render_page(trace: Mapping[str, Any]) -> str:
    r"""Return the page that replays `trace`; it loads nothing from anywhere, and is ASCII inside its data.

    `trace` is plain JSON:

        {"title": str,
         "settings": {name: value},
         "rows": [{"positions": [{"given": bool, "id": int, "text": str}],
                   "num_steps": int,
                   "events": [{"step": int, "position": int, "id": int, "text": str,
                               "confidence": float, "kind": "commit" | "revise" | "reopen"}]}]}

    `positions` is the final canvas in order, and `text` the decoded piece of one token: it may hold newlines, or
    U+FFFD for a part of a character. Steps count from 1 to `num_steps`; step 0 is the canvas before the first.
    `events` are sorted by step, `confidence` is in [0, 1], and a position without events that was not given stays open.

    A row may have `watched` (`explain.Watcher.page`): then the page has a heat map and alternatives too.

    Raises ValueError for a trace that the page could not replay, and for a setting that is not finite.
    """
    if not trace["rows"]:
        raise ValueError("trace must hold at least one row; got none. Sample with trace=True and at least one prompt.")
    for number, row in enumerate(trace["rows"]):
        _check_row(row, number=number)
    parts = {"title": html.escape(trace["title"]), "trace": _embed(trace)}
    template = files("redraft.sampling").joinpath("trace_page.html").read_text(encoding="utf-8")
    # One pass: a token that reads {{title}} is not replaced in its turn.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _embed(value: Any) -> str:
    """Return JSON that cannot end or change the <script> element it stands in, whatever its strings hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 and lone surrogates are escaped
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _check_row(row: Mapping[str, Any], *, number: int) -> None:
    """Raise ValueError at the first event that the page could not replay."""
    last, num_steps, num_positions = 1, row["num_steps"], len(row["positions"])
    for event in row["events"]:
        where = f"row {number}, position {event['position']}"
        if not last <= event["step"] <= num_steps:
            raise ValueError(
                f"step must be sorted and in 1 ... {num_steps}; got {event['step']} after {last} at {where}. "
                "Count steps from 1: step 0 is the canvas before the first."
            )
        if not 0 <= event["position"] < num_positions:
            raise ValueError(f"position must be in 0 ... {num_positions - 1}; got {where}. Count from the row's start.")
        if not 0 <= event["confidence"] <= 1:
            raise ValueError(f"confidence must be in [0, 1]; got {event['confidence']} at {where}. Give a probability.")
        if event["kind"] not in KINDS:
            raise ValueError(
                f"kind must be one of {', '.join(KINDS)}; got {event['kind']!r} at {where}. Use one of them."
            )
        last = event["step"]
