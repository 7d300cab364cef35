"""The chat page in a real browser: it talks to the engine, and to nobody else."""

import re
import shutil

import httpx
import pytest
from running import Running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0])
    yield running
    running.stop()


def test_the_page_fetches_nothing_from_elsewhere(server):
    answer = httpx.get(server.url + "/", trust_env=False)
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:,)|https?://|@import", answer.text)
    assert "default-src 'none'" in answer.headers["content-security-policy"]


IN_VIEW = "document.querySelector('article.error').getBoundingClientRect().bottom <= innerHeight"


def test_a_conversation_in_a_browser(server, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("no chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, asked, wrong = browser.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.goto(server.url + "/")
        page.locator("#state", has_text="weights 0").wait_for()  # eval is forbidden by the page's policy
        page.uncheck("#thinking")
        page.fill("#temperature", "1")
        page.fill("#tokens", "30")
        for turn in range(2):
            page.fill("#say", "hello <b>there</b>")
            page.keyboard.press("Enter")
            page.locator("article.assistant").nth(turn).wait_for()
            page.locator("#send", has_text="Send").wait_for()
        assert page.locator("article.user").first.text_content() == "hello <b>there</b>"
        assert page.locator("article.assistant > span").first.text_content()
        assert "limit of tokens" in page.locator("article.assistant > em").all_text_contents()[0]
        page.evaluate("scrollTo(0, 0)")
        page.fill("#tokens", "100000")
        page.fill("#say", "hello " * 400)
        page.click("#send")
        page.wait_for_selector("article.error")
        assert "256" in page.locator("article.error").text_content()
        assert page.evaluate(IN_VIEW), "an error is seen, however long what was said"
        page.screenshot(path=str(tmp_path / "page.png"))
        page.click("#new")
        assert not page.locator("article").count()
        browser.close()
    assert all(url.startswith((server.url, "data:")) for url in asked)
    assert [text for text in wrong if "400" not in text] == []
