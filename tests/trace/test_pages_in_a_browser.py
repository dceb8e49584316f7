"""The pages in a real browser: no error in the console, the scrubber works, and large ones stay fluid."""

import random
import shutil
from statistics import median

import pytest
import torch

from redraft.trace.explain import Watcher
from redraft.trace.page import joined, render_page

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Open a page from its data; whatever the console says is an error."""
    said = []

    def open_page(data):
        path = tmp_path / "page.html"
        path.write_text(render_page(data), encoding="utf-8")
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_page
    assert said == []


def a_trace(num_steps, num_positions, *, is_watched, top_k=5):
    """Tokens decided in a random order, some of them revised, one of them hostile."""
    draw = random.Random(0)
    texts = [f"w{i} " for i in range(num_positions)]
    texts[0] = "</script><script>alert(1)</script>"
    order = draw.sample(range(num_positions), num_positions)
    events = [
        {"step": 1 + i * num_steps // num_positions, "position": p, "id": p, "text": texts[p], "confidence": 0.5}
        for i, p in enumerate(order)
    ]
    events = [{**event, "kind": "commit"} for event in events]
    events.append({**events[0], "step": num_steps, "kind": "revise"})
    positions = [{"given": False, "id": p, "text": texts[p]} for p in range(num_positions)]
    row = {"positions": positions, "num_steps": num_steps, "events": events}
    if is_watched:
        watcher = Watcher(mask_token_id=-1, top_k=top_k)
        where = torch.arange(num_positions)
        for _ in range(num_steps):
            p = torch.rand(num_positions, top_k).sort(descending=True).values / top_k
            watcher.steps.append((where, torch.rand(num_positions), torch.randint(50, (num_positions, top_k)), p))
        row["watched"] = watcher.data(num_positions=num_positions, text_of=lambda token: f"<b>{token}</b>")
    return {"title": "a <b>title</b>", "settings": {"steps": num_steps}, "rows": [row]}


def move_to(page, step):
    page.evaluate(
        "step => { const s = document.getElementById('scrub'); s.value = step; s.dispatchEvent(new Event('input')); }",
        step,
    )


@pytest.mark.parametrize("is_watched", [False, True], ids=["trace", "explain"])
def test_the_scrubber_replays_the_steps(opened, is_watched):
    from playwright.sync_api import expect

    page = opened(a_trace(8, 16, is_watched=is_watched))
    filled = page.locator("#canvas .filled")
    assert page.locator("#status b").inner_text() == "Step 8 of 8"
    assert filled.count() == 16
    move_to(page, 0)
    assert page.locator("#status b").inner_text() == "Step 0 of 8"
    assert filled.count() == 0
    move_to(page, 3)
    assert filled.count() == 6
    page.keyboard.press("ArrowRight")
    assert filled.count() == 8
    assert page.locator("#heat").is_visible() == is_watched
    page.click("#play")
    expect(page.locator("#status b")).to_have_text("Step 8 of 8")


def test_a_click_on_a_token_or_on_the_map_shows_its_alternatives_over_time(opened):
    page = opened(a_trace(8, 16, is_watched=True))
    page.locator("#canvas .cell").nth(3).click()
    assert "position 3" in page.locator("#chosen").inner_text()
    assert page.locator("#chosen tr").count() == 8
    assert page.locator("#chosen tr.current td").first.inner_text() == "step 8"
    assert "<b>" in page.locator("#chosen tr").first.inner_text()  # text, not markup
    move_to(page, 2)
    assert page.locator("#chosen tr.current td").first.inner_text() == "step 2"
    box = page.locator("#map").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 5.5 / 16, box["y"] + box["height"] * 4.5 / 8)
    assert "position 5" in page.locator("#chosen").inner_text()
    assert page.locator("#status b").inner_text() == "Step 5 of 8"
    drawn = page.evaluate(
        "() => { const c = document.querySelector('#map canvas');"
        " return [c.width, c.height, c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)]; }"
    )
    assert drawn == [16, 8, True]


def test_a_thousand_steps_of_a_thousand_tokens_stay_fluid(opened):
    page = opened(a_trace(1000, 1000, is_watched=True))
    page.locator("#canvas .cell").nth(3).click()
    steps = [random.Random(1).randrange(1001) for _ in range(40)] + list(range(400, 440))
    times = page.evaluate(
        """steps => steps.map(step => {
          const scrub = document.getElementById("scrub"), start = performance.now();
          scrub.value = step;
          scrub.dispatchEvent(new Event("input"));
          document.body.getBoundingClientRect();  // the layout is part of the move
          return performance.now() - start;
        })""",
        steps,
    )
    print(f"median of a jump {median(times[:40]):.1f} ms, of a step {median(times[40:]):.1f} ms")
    assert median(times[:40]) < 100
    assert median(times[40:]) < 100


def test_rows_of_a_joined_page_are_picked_by_name(opened):
    page = opened(
        joined({"a sudoku": a_trace(3, 4, is_watched=False), "<b>": a_trace(2, 4, is_watched=False)}, title="x")
    )
    assert page.locator("#row option").all_text_contents() == ["1: a sudoku", "2: <b>"]
