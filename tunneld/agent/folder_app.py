"""The files of a folder as an ASGI application, read only: see folder.py.

Starlette's `StaticFiles` finds the files, and answers with types, ranges, ETags and 304. It is imported only where a
folder is exposed: the agent as a single file has it not.
"""

from __future__ import annotations

import html
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from tunneld.agent.folder_server import serve_connections
from tunneld.policy.units import format_size

INDEX = "index.html"
MAX_LISTED = 10_000
"""Entries in the page of a folder: about a megabyte."""
HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
"""Browsers ask each time whether a file has changed, which costs a 304, and take its type as it is given."""
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root{{color-scheme:light dark;font-family:system-ui}}
td{{padding:.1em 1em .1em 0}}
td+td{{text-align:right}}
</style>
<h1>{title}</h1><table>
{rows}
</table>{more}</html>
"""


async def serve_folder(folder: Path, path: str, *, task_status: trio.TaskStatus[None]) -> None:
    """Serve a folder at a Unix socket until cancelled."""
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(path)
    listener.listen()
    task_status.started()
    await serve_connections(folder_app(folder), trio.SocketListener(listener))


def folder_app(folder: Path) -> Starlette:
    """The application that serves a folder."""
    return Starlette(routes=[Mount("/", app=SharedFolder(folder))])


class SharedFolder(StaticFiles):
    """Files without dots, and lists of them."""

    def __init__(self, folder: Path) -> None:
        """`folder` is resolved: it has no symbolic links."""
        super().__init__(directory=folder)
        self._folder = folder

    async def get_response(self, path: str, scope: Any) -> Response:
        """The response to a request for a path in the folder. Raises `HTTPException`."""
        if scope["method"] not in {"GET", "HEAD"}:
            raise HTTPException(405, headers={"Allow": "GET, HEAD"})
        found, about = await trio.to_thread.run_sync(self._find, path)
        if about is None:
            raise HTTPException(404)
        response: Response
        if stat.S_ISREG(about.st_mode) and Path(found).name == INDEX and not _names(scope["path"], INDEX):
            response = self._index(found, about, scope)
        elif stat.S_ISREG(about.st_mode):
            response = self.file_response(found, about, scope)
        elif not scope["path"].endswith("/"):
            response = _with_slash(scope["path"])
        else:
            rows = await trio.to_thread.run_sync(list_folder, Path(found), self._folder)
            response = HTMLResponse(page_of(scope["path"], rows))
        response.headers.update(HEADERS)
        return response

    def _index(self, found: str, about: os.stat_result, scope: Any) -> Response:
        """The index of a folder, whose relative links need a slash at the end of the address."""
        return self.file_response(found, about, scope) if scope["path"].endswith("/") else _with_slash(scope["path"])

    def _find(self, path: str) -> tuple[str, os.stat_result | None]:
        """The file or folder to serve; an index instead of its folder."""
        try:
            found, about = self.lookup_path(path)
            if about is not None and stat.S_ISDIR(about.st_mode):
                index, about_index = self.lookup_path(f"{path}/{INDEX}")
                if about_index is not None and stat.S_ISREG(about_index.st_mode):
                    found, about = index, about_index
        except (OSError, ValueError):  # a name that is too long, a zero byte, no permission
            return "", None
        if about is None or any(map(is_hidden, path.split("/"))) or not is_public(found, self._folder):
            return "", None
        return found, about if stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode) else None


def _names(path: str, name: str) -> bool:
    return path.rpartition("/")[2] == name


def _with_slash(path: str) -> Response:
    """Lead to the address with a slash at its end. It is relative: this server does not know its public name."""
    return RedirectResponse(f"./{quote(path.rpartition('/')[2])}/", 308)


def is_hidden(name: str) -> bool:
    """Whether a name begins with a dot, other than that of the folder itself."""
    return name.startswith(".") and name != "."


def is_public(path: str, folder: Path) -> bool:
    """Whether a resolved path is in the folder, and none of its names is hidden."""
    try:
        return not any(map(is_hidden, Path(path).relative_to(folder).parts))
    except ValueError:
        return False


def list_folder(path: Path, shared: Path) -> list[tuple[str, int | None]]:
    """The entries of a folder that are served: names, and sizes of files. Folders come first."""
    found: list[tuple[str, int | None]] = []
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                is_here = not entry.is_symlink() or is_public(os.path.realpath(entry.path), shared)
                if is_hidden(entry.name) or not is_here or not (entry.is_dir() or entry.is_file()):
                    continue
                found.append((entry.name, None if entry.is_dir() else entry.stat().st_size))
            except OSError:  # removed meanwhile, or a link to nothing
                continue
    return sorted(found, key=lambda row: (row[1] is not None, row[0].lower()))


def page_of(path: str, rows: list[tuple[str, int | None]]) -> str:
    """The page of a folder."""
    more = f"<p>and {len(rows) - MAX_LISTED} more" if len(rows) > MAX_LISTED else ""
    return PAGE.format(title=html.escape(path), rows="\n".join(_rows(path, rows[:MAX_LISTED])), more=more)


def _rows(path: str, rows: list[tuple[str, int | None]]) -> Iterator[str]:
    if path != "/":
        yield '<tr><td><a href="../">..</a><td>'
    for name, size in rows:
        slash = "/" if size is None else ""
        link, shown = html.escape(f"./{quote(name, errors='surrogateescape')}{slash}"), html.escape(name + slash)
        printed = shown.encode(errors="replace").decode()
        yield f'<tr><td><a href="{link}">{printed}</a><td>{"" if size is None else format_size(size)}'
