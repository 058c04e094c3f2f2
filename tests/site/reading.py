"""How the tests look at the site: a reader with a browser, which pages there are of each kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ON_A_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"desktop": (1280, 720), "phone": (390, 844)}


@dataclass
class Reader:
    """A page of the site at one size, and what went wrong on it."""

    page: Page
    address: str
    wrong: list[str] = field(default_factory=list)

    def open(self, name: str) -> Page:
        self.page.goto(self.address + name)
        return self.page


def one(site: Path, folder: str) -> str:
    """The last chapter's page in a folder of the site."""
    names = sorted(path.name for path in (site / folder).glob("[0-9][0-9]_*.html"))
    assert names, f"no chapter in {folder}"
    return f"{folder}/{names[-1]}"


def kinds(site: Path) -> list[str]:
    """A page of each kind."""
    chapter = [one(site, folder) for folder in ("lessons", "summary", "interview_questions")]
    return ["index.html", *chapter, "interview_questions/index.html", "summary/glossary.html", "api/parallel/data.html"]
