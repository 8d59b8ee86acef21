"""Applications that note each request in the file $COUNTED, `METHOD TARGET` a line, and answer with the target.

For uvicorn `tests.support.counting:asgi`, for gunicorn `tests.support.counting:wsgi`, and `SCRIPT` for node.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SCRIPT = """
const fs = require("fs")
require("http").createServer((request, response) => {
    fs.appendFileSync(process.env.COUNTED, `${request.method} ${request.url}\\n`)
    request.resume().on("end", () => response.end(request.url))
}).listen(Number(process.argv[2]), "127.0.0.1")
"""


def count(method: str, target: str) -> bytes:
    """Note a request; returns the body of its answer."""
    with Path(os.environ["COUNTED"]).open("a") as file:
        file.write(f"{method} {target}\n")
    return target.encode()


async def asgi(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[dict[str, Any]], Any]) -> None:
    if scope["type"] != "http":
        return
    target = scope["raw_path"].decode() + ("?" + scope["query_string"].decode() if scope["query_string"] else "")
    body = count(scope["method"], target)
    while (await receive()).get("more_body"):
        pass
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def wsgi(environment: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], Any]) -> Iterable[bytes]:
    body = count(environment["REQUEST_METHOD"], environment["RAW_URI"])
    while environment["wsgi.input"].read(65536):
        pass
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
