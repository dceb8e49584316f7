"""The page is checked without a browser: its structure, its data, and that it loads nothing from anywhere."""

import json
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest

from redraft.trace.page import joined, page_data, render_page

VOID = {"meta", "link", "input", "br", "hr", "img"}
HOSTILE = [
    "</script>",
    "</SCRIPT ><script>alert(1)</script>",
    "<!--",
    "<!--<script>",
    "-->",
    "]]>",
    "&lt;/script&gt;",
    "{{title}}",
    "{{trace}}",
    r"\1 \g<0> \u003c",
    '"\\',
    "\u2028\u2029",
    "\ufffd",
    "\ud800",
    "\x00\x1b\r\n\t ",
    "",
    "日本語 🙂 عربى",
]


class Page(HTMLParser):
    """The elements of a page, the text of each, and every tag left open or closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.stack: list[str] = []
        self.misnested: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.misnested.append(tag)

    def handle_data(self, data: str) -> None:
        if self.stack:
            self.texts[self.stack[-1]][-1] += data


def make_trace(texts: list[str], *, title: str = "A trace") -> dict[str, Any]:
    """One row whose tokens are `texts`, one committed at each step."""
    positions = [{"given": False, "id": k, "text": text} for k, text in enumerate(texts)]
    events = [
        {"step": k + 1, "position": k, "id": k, "text": text, "confidence": 0.5, "kind": "commit"}
        for k, text in enumerate(texts)
    ]
    return {
        "title": title,
        "settings": {text: text for text in texts},
        "rows": [{"positions": positions, "num_steps": len(texts), "events": events}],
    }


def test_hostile_strings_round_trip_through_the_embedded_json() -> None:
    for text in HOSTILE:
        trace = make_trace(["x", text], title=text)
        assert json.loads(Page(render_page(trace)).texts["script"][0]) == trace


def test_a_joined_page_holds_the_rows_of_all_named_by_their_page() -> None:
    pages = {"first": make_trace(["a", "b"]), "second": make_trace(["c"])}
    whole = joined(pages, title="both")
    assert [row["title"] for row in whole["rows"]] == ["first", "second"]
    assert [row["num_steps"] for row in whole["rows"]] == [2, 1]
    assert json.loads(Page(render_page(whole)).texts["script"][0]) == whole


def test_hostile_strings_leave_the_structure_of_the_page_as_it_is() -> None:
    plain = Page(render_page(make_trace(["a"])))
    hostile = Page(render_page(make_trace(HOSTILE, title="</title></h1><script>")))
    assert hostile.elements == plain.elements
    assert hostile.texts["title"] == ["</title></h1><script>"]
    assert hostile.texts["script"][1] == plain.texts["script"][1]


def test_embedded_json_holds_no_character_that_html_reads() -> None:
    page = render_page(make_trace(HOSTILE))
    data = page.split('type="application/json">')[1].split("</script>")[0]
    assert data.isascii()
    assert not set("<>&\n") & set(data)


def test_every_tag_is_closed_in_turn_and_every_id_is_unique() -> None:
    page = Page(render_page(make_trace(["a"])))
    assert page.stack == []
    assert page.misnested == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in page.elements[:2]] == ["html", "head"]


def test_page_loads_nothing_from_anywhere() -> None:
    text = render_page(make_trace(["a"]))
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    page = Page(text)
    assert not [attributes for _, attributes in page.elements if "src" in attributes]
    assert [attributes["href"] for _, attributes in page.elements if "href" in attributes] == ["data:,"]
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_no_placeholder_of_the_template_is_left() -> None:
    assert "{{trace}}" in files("redraft.trace").joinpath("page.html").read_text(encoding="utf-8")
    assert "{{" not in render_page(make_trace(["a"])).split("<script>")[0]


def test_every_control_has_a_name() -> None:
    page = render_page(make_trace(["a"]))
    for tag, attributes in Page(page).elements:
        if tag == "input" or (tag == "button" and "data-mode" not in attributes):
            assert attributes.get("aria-label"), (tag, attributes)


@pytest.mark.parametrize("settings", [{"preset": "llada"}, {"preset": "remdm"}])
def test_the_events_of_a_generation_can_be_replayed(lm: Any, settings: dict[str, Any]) -> None:
    traces = lm.generate([[5, 6], [7, 8, 9]], max_new_tokens=8, trace=True, **settings).trace
    for row in page_data(traces, title="", settings={}, text_of=str)["rows"]:
        steps = [event["step"] for event in row["events"]]
        assert steps == sorted(steps)
        assert {1, row["num_steps"]} <= {*steps, row["num_steps"]} <= set(range(1, row["num_steps"] + 1))
        assert all(0 <= event["position"] < len(row["positions"]) for event in row["events"])
        assert all(0 <= event["confidence"] <= 1 for event in row["events"])
        assert {event["kind"] for event in row["events"]} <= {"commit", "revise", "reopen"}


def test_a_setting_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        render_page(make_trace(["a"]) | {"settings": {"threshold": float("inf")}})
