"""Draws docs/assets/page.png: two turns on the page of a server that runs.

    python -m medusa_jax.serve --slots 1 &
    python docs/draw_page.py http://127.0.0.1:8000

Needs the extra [test], and Debian's package `chromium`.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

TURNS = ("Tom finds a red ball in the park", "What does he do next?")


def main(address: str) -> None:
    """Chats, and writes the picture."""
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 560})
        page.goto(address)
        for number, turn in enumerate(TURNS, 1):
            page.fill("#text", turn)
            page.click("#send")
            done = f"document.querySelectorAll('.verdict').length == {number}"
            page.wait_for_function(done, timeout=600_000)
        page.screenshot(path=Path(__file__).parent / "assets/page.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
