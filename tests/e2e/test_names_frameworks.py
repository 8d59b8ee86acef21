"""Development servers behind a host name: Django's and Vite's, which refuse hosts that they do not know."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from tests.support.browser import browser
from tests.support.named import DOMAIN, Named, named
from tests.support.programs import free_port, listening, run
from tests.support.system import lacking

Find = Callable[[str], str]
HOST = f"blog.{DOMAIN}"

PAGE = '<!doctype html><h1></h1><script type="module" src="/main.js"></script>'
SCRIPT = """
document.querySelector("h1").textContent = "{}"
if (import.meta.hot) import.meta.hot.accept()
"""
HEADING = "document.querySelector('h1').textContent"
UNTIL_CHANGED = f"""
new Promise(kept => {{
    const look = () => {{ if ({HEADING} == "second") kept(window.marked) }}
    new MutationObserver(look).observe(document.querySelector("h1"), {{ childList: true }})
    look()
}})
"""


def url(site: Named, path: str = "/") -> str:
    return f"http://{HOST}:{site.port}{path}"


async def visit(find: Find, site: Named, path: str = "/", *words: str) -> tuple[int, str]:
    """The status and the body that curl gets."""
    command = [find("curl"), "-sS", "--max-time", "30", "--resolve", f"{HOST}:{site.port}:127.0.0.1"]
    said = await run([*command, "-w", "\n%{http_code}", *words, url(site, path)])
    body, _, status = said.rpartition("\n")
    return int(status), body


async def test_a_form_of_django(tmp_path: Path, program_path: Find) -> None:
    """It compares Origin with Host, needs its cookie back, and redirects to an absolute address."""
    if find_spec("django") is None:
        lacking("the Python package django is not installed")
    port, jar = await free_port(), ["--cookie", f"{tmp_path}/jar", "--cookie-jar", f"{tmp_path}/jar"]
    server = [sys.executable, "-m", "tests.support.django_site", "runserver", "--noreload", f"127.0.0.1:{port}"]
    async with listening(server, port), named(tmp_path, {}) as site:
        async with site.expose("blog", str(port)):
            status, body = await visit(program_path, site)
            assert (status, "Invalid HTTP_HOST header" in body) == (400, True)
        async with site.expose("blog", str(port), "--host-header", "local"):
            status, token = await visit(program_path, site, "/", *jar)
            assert status == 200
            post = [*jar, "--include", "--data", f"csrfmiddlewaretoken={token}"]
            assert (await visit(program_path, site, "/", *post, "-H", "Origin: http://elsewhere.example"))[0] == 403
            origin = f"Origin: {url(site).rstrip('/')}"
            status, answer = await visit(program_path, site, "/", *post, "-H", origin)
            assert (status, f"\nLocation: {url(site, '/done')}\n" in answer.replace("\r", "")) == (302, True)
            assert await visit(program_path, site, "/done") == (200, f"done at localhost:{port}")


async def test_vite_replaces_a_module_in_a_page_that_is_shown(tmp_path: Path, program_path: Find) -> None:
    vite, root, port = program_path("vite"), tmp_path / "app", await free_port()
    program_path("chromium")
    root.mkdir()
    (root / "index.html").write_text(PAGE)
    (root / "main.js").write_text(SCRIPT.replace("{}", "first"))
    server = [vite, str(root), "--host", "127.0.0.1", "--port", str(port), "--strictPort"]
    async with listening(server, port), named(tmp_path, {}) as site, browser(tmp_path, program_path, HOST) as running:
        async with site.expose("blog", str(port)):
            status, body = await visit(program_path, site)
            assert (status, "This host" in body) == (403, True)
        async with site.expose("blog", str(port), "--host-header", "local"):
            page = await running.open_page()
            await page.visit(url(site))
            await page.wait_for("Network.webSocketFrameReceived")  # Vite's greeting: it reports changes from now on
            assert await page.ask(HEADING) == "first"
            await page.ask("window.marked = true")
            (root / "main.js").write_text(SCRIPT.replace("{}", "second"))
            assert await page.ask(UNTIL_CHANGED) is True  # a page that was loaded again would have no mark
