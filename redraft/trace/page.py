"""Render traces as one self-contained HTML page that replays the denoising step by step."""

import html
import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from redraft.trace.explain import Watcher
from redraft.trace.record import RowTrace


def page_data(
    traces: list[RowTrace],
    *,
    title: str,
    settings: dict[str, Any],
    text_of: Callable[[int], str],
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Lay traces out as plain JSON for `render_page`; `text_of` decodes one token id.

        {"title": str,
         "settings": {name: value},
         "rows": [{"positions": [{"given": bool, "id": int, "text": str}],
                   "num_steps": int,
                   "events": [{"step": int, "position": int, "id": int, "text": str,
                               "confidence": float, "kind": "commit" | "revise" | "reopen"}],
                   "watched": what `Watcher.data` returns, where a watcher is given,
                   "title": name of the row, in a page that `joined` made}]}

    `positions` is the final canvas in order, and `text` the decoded piece of one token: it may hold newlines, or
    U+FFFD for a part of a character. Steps count from 1 to `num_steps`; step 0 is the canvas before the first.
    `events` are sorted by step. A position without events that was not given stays open.
    """
    rows = [_row(trace, text_of) for trace in traces]
    if watcher is not None:
        rows[0]["watched"] = watcher.data(num_positions=len(rows[0]["positions"]), text_of=text_of)
    return {"title": title, "settings": settings, "rows": rows}


def joined(pages: Mapping[str, Mapping[str, Any]], *, title: str) -> dict[str, Any]:
    """Lay the rows of several pages out as one; a row is named by the key of its page."""
    rows = [row | {"title": name} for name, page in pages.items() for row in page["rows"]]
    return {"title": title, "settings": {}, "rows": rows}


def _row(trace: RowTrace, text_of: Callable[[int], str]) -> dict[str, Any]:
    end = max((p for p, is_noise in enumerate(trace.is_noise) if not is_noise), default=-1) + 1
    positions = zip(trace.is_given[:end], trace.token_ids[:end], strict=True)  # what is behind an early end is no text
    return {
        "num_steps": trace.num_steps,
        "positions": [{"given": is_given, "id": token, "text": text_of(token)} for is_given, token in positions],
        "events": [
            {
                "step": event.step + 1,
                "position": event.position,
                "id": event.token_id,
                "text": text_of(event.token_id),
                "confidence": event.confidence,
                "kind": event.kind,
            }
            for event in trace.events
            if event.position < end
        ],
    }


def render_page(data: Mapping[str, Any]) -> str:
    """Return the page of `page_data`. It loads nothing from anywhere, and its data are ASCII.

    Raises ValueError for a setting that is not finite.
    """
    parts = {"title": html.escape(data["title"]), "trace": _embed(data)}
    template = files("redraft.trace").joinpath("page.html").read_text(encoding="utf-8")
    # All placeholders in one pass: a token whose text is {{title}} must not be replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _embed(value: Any) -> str:
    """Return JSON that cannot end or change the <script> element it stands in, whatever its strings hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 and lone surrogates are escaped
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")
