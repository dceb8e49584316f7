"""The page in a real browser: the draft forms, the numbers are told, and nothing but the server is asked."""

import shutil

import pytest
from server_doubles import ANSWER, serving

pytestmark = pytest.mark.real


@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        opened, said = browser.new_page(), []
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        yield opened
        browser.close()
        assert said == []


def test_a_draft_forms_and_becomes_the_answer(page, backend, engine):
    engine.tick_seconds, engine.answer = 0.05, "<b>bold</b> & " + ANSWER
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    with serving(backend) as server:
        page.goto(server.url)
        page.wait_for_selector("#model option", state="attached")
        page.fill("#prompt", "hi")
        page.fill("#length", "60")
        page.click("#run")
        page.wait_for_selector("#answer .draft")
        drafted = page.text_content("#answer")
        assert drafted == engine.answer[:60]  # the text and the draft, each token once
        page.wait_for_selector("#run:not(:disabled)")
        assert page.text_content("#answer") == engine.answer[:60]
        assert "60 tokens in 15 forwards, 4.00 tokens per forward" in page.text_content("#numbers")
        page.select_option("#kind", "text")
        engine.is_held = True
        page.click("#run")
        page.click("#stop")
        page.wait_for_selector("#numbers:text-is('stopped')")
        assert all(url.startswith(server.url) for url in asked)


def test_an_error_is_told(page, backend, engine):
    engine.fails_with = "it failed."
    with serving(backend) as server:
        page.goto(server.url)
        page.wait_for_selector("#model option", state="attached")
        page.fill("#prompt", "hi")
        page.fill("#length", "20")
        page.click("#run")
        page.wait_for_selector("#numbers:text-is('it failed.')")
