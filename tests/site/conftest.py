"""The site, built once for all tests of it, served on this machine, and a browser to read it.

Without Chromium the tests in a browser are skipped and say so; under CI=true they fail.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Request, Route, sync_playwright
from reading import FLAGS, NAMES, ON_A_MAC, SIZES, Reader

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site, built by the first process that asks: all those of one test run read it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return _built()
    shared = tmp_path_factory.getbasetemp().parent / "site"
    with shared.open("a+") as done:
        fcntl.flock(done, fcntl.LOCK_EX)
        done.seek(0)
        if not done.read():
            _built()
            done.write("built")
    return ROOT / ".site" / "html"


def _built() -> Path:
    """Any warning fails here; with `--quiet` MkDocs would not count them."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    for command in (["picotron_mini.course.site", ".", ".site/docs"], ["mkdocs", "build", "--strict"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"
    return ROOT / ".site" / "html"


SENT: list[tuple[str, int]] = []  # (path, bytes) of each answer, as the server of the site gave it


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def send_header(self, keyword: str, value: str) -> None:
        if keyword.lower() == "content-length":
            SENT.append((self.path, int(value)))
        super().send_header(keyword, value)


@pytest.fixture
def sent() -> list[tuple[str, int]]:
    """The (path, bytes) of each answer that the site's server gives from now on."""
    SENT.clear()
    return SENT


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where the site is served, as `http://127.0.0.1:PORT/`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = next((found for name in (*NAMES, ON_A_MAC) if (found := shutil.which(name))), None)
    if path is None:
        message = "no Chromium: the site was NOT looked at in a browser; install the package chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def reader(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Reader]:
    width, height = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(15_000)
    reader = Reader(page, address)

    def guard(route: Route) -> None:
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            reader.wrong.append(f"asked elsewhere: {route.request.url}")
            route.abort()

    def failed(request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the reader went on before it was there
            reader.wrong.append(f"failed: {request.url}: {request.failure}")

    context.route("**/*", guard)
    page.on("console", lambda m: reader.wrong.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: reader.wrong.append(f"script: {error}"))
    page.on("requestfailed", failed)
    page.on("response", lambda r: reader.wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    yield reader
    assert not reader.wrong, "\n".join(reader.wrong)
    context.close()
