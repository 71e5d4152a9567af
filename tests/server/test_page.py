"""The page, in a browser."""

import shutil

import pytest

from medusa_jax.serving.ladder import Chooser

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_two_turns_on_the_page(address: str, monkeypatch: pytest.MonkeyPatch):
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra [test]")
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    # Not by load: on a busy machine plain steps may look faster.
    monkeypatch.setattr(Chooser, "step", lambda self, rows, ready: ready[-1])
    problems: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 375, "height": 700})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text))
        page.set_default_timeout(120_000)
        page.goto(address)
        for turn, words in enumerate(["Tom has a ball.", "Go on."], 1):
            page.fill("#text", words)
            page.click("#send")
            page.wait_for_function(f"document.querySelectorAll('.verdict').length == {turn}")
        verdicts = page.locator(".verdict").all_inner_texts()
        assert all(verdict.startswith("The same text, at ") for verdict in verdicts)
        medusa, plain = (page.locator(".answers").last.locator(".answer").nth(i) for i in range(2))
        marks = medusa.locator(".step").all_inner_texts(), plain.locator(".step").all_inner_texts()
        assert "".join(marks[0]) == "".join(marks[1]) and 1 < len(marks[0]) < len(marks[1])
        colors = [
            medusa.locator(".step").nth(i).evaluate("e => getComputedStyle(e).backgroundColor")
            for i in range(3)
        ]
        assert colors[0] == colors[2] != colors[1]
        figures = {
            name: [float(one.locator(f".{name}").inner_text()) for one in (medusa, plain)]
            for name in ("speed", "accepted")
        }
        assert all(speed > 0 for speed in figures["speed"])
        assert figures["accepted"][0] > 1.2 and figures["accepted"][1] == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        page.fill("#text", "Tom " * 400)
        page.click("#send")
        page.wait_for_selector(".error")
        assert "609 exceed a capacity" in page.locator(".error").inner_text()
        browser.close()
    assert [one for one in problems if "400" not in one] == []
