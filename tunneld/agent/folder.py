"""`tunnel expose ./folder`: the files of a folder over HTTP, read only.

Starlette finds them (folder_app.py), and h11 speaks HTTP (folder_server.py). The single file lacks Starlette.
The server listens on a Unix socket in a folder that only this user can enter, so that visitors come through the tunnel,
with its limits, or not at all.

Nothing is served whose name, or that of a folder above it, begins with a dot, or that a symbolic link leads out of the
folder to. A folder without index.html is shown as a list.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from tunneld.errors import UsageError


def folder_of(target: str) -> Path | None:
    """The folder that a target names, if it is written as a path: with a slash, or as one or two dots. Raises
    `UsageError` if there is none.
    """
    if target.startswith("unix:") or "://" in target or not (os.sep in target or target in {".", "..", "~"}):
        return None
    path = Path(target).expanduser()
    if not path.is_dir():
        raise UsageError(f"{target} is not a folder; to expose a server on a Unix socket, use unix:PATH")
    return path.resolve()


@asynccontextmanager
async def serving_folder(folder: Path) -> AsyncIterator[str]:
    """Serve a folder during the block; yields the target. Raises `UsageError` if a package is missing."""
    try:
        from tunneld.agent.folder_app import serve_folder  # noqa: PLC0415 - packages that the single file lacks
    except ModuleNotFoundError as error:
        raise UsageError(
            f"to expose a folder, the Python package {error.name} is needed, which is not installed here; use a full "
            "installation of tunneld, or a server of your own, such as python3 -m http.server"
        ) from None
    with tempfile.TemporaryDirectory(prefix="tunnel-") as private:
        socket = f"{private}/http"
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve_folder, folder, socket))
            yield f"unix:{socket}"
            nursery.cancel_scope.cancel()
