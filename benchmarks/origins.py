"""`python -m benchmarks.origins`: how many requests do the relay and real servers read from the same bytes?

Each case of `tests.support.smuggling` goes through the HTTP port to every server found on PATH (nginx, HAProxy, node,
and of Python's uvicorn, hypercorn, gunicorn and waitress), followed by a request for /marker on the same connection.
Every server numbers the requests that it counts. Per case, the relay and the server must agree:

    passed     two responses, for the case and the marker in that order, and the server has counted two requests more
    refused    one response with the status of the case, then the end of the connection; the server has counted none,
               or, where the fault is in the body, at most the one request, and never the marker

A server may refuse what the relay passes on; that is listed, and no fault. An answer for /smuggled always is.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import servers
from benchmarks.network import own_network
from benchmarks.processes import LOOPBACK, Address, Child, Crew, descriptor_limit, find, free_port, need, orphans_ended
from benchmarks.topologies import TUNNEL, TUNNEL_TOML, TUNNELD
from tests.support.smuggling import NAME, Case, cases

TIMEOUT = 10.0
MARKER = b"GET /marker HTTP/1.1\r\nHost: " + NAME + b"\r\nConnection: close\r\n\r\n"

CONFIG = (
    TUNNEL_TOML
    + """
[names]
domain = "t.example.org"
http = "127.0.0.1:{http}"
"""
)

APP = """
import itertools

count = itertools.count(1)


def wsgi(environ, start_response):
    environ["wsgi.input"].read()
    body = f"{environ['PATH_INFO']} {next(count)} {environ.get('HTTP_X_FORWARDED_FOR')}".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]


async def asgi(scope, receive, send):
    if scope["type"] != "http":
        return
    number = next(count)
    while (await receive()).get("more_body"):
        pass
    forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    body = f"{scope['path']} {number} {b'+'.join(forwarded).decode()}".encode()
    head = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})
"""

NODE = """
let count = 0;
require('http').createServer((request, response) => {
  const number = ++count;
  request.resume();
  request.on('end', () => response.end(`${request.url.split('?')[0]} ${number} ${request.headers['x-forwarded-for']}`));
}).listen(PORT, '127.0.0.1');
"""

HAPROXY = """
global
    nbthread 1
defaults
    mode http
    timeout client 20s
    timeout server 20s
    timeout connect 5s
frontend origin
    bind 127.0.0.1:PORT
    http-request wait-for-body time 5s if METH_POST
    http-request return status 200 content-type text/plain lf-string "%[path] %rt %[req.hdr(x-forwarded-for)]"
"""

NGINX = """
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    large_client_header_buffers 4 16k;
    server {{
        listen 127.0.0.1:{port};
        location / {{ return 200 "$uri $connection_requests $http_x_forwarded_for"; }}
    }}
}}
"""


def nginx(crew: Crew, port: int) -> Child:
    """Start nginx, which counts per connection."""
    text = servers.nginx_basics(crew.folder, descriptor_limit()) + NGINX.format(folder=crew.folder, port=port)
    return crew.start("nginx", servers.nginx_command(crew.file("origin.conf", text)))


def haproxy(crew: Crew, port: int) -> Child:
    """Start HAProxy as a server."""
    return crew.start(
        "haproxy", [need("haproxy"), "-db", "-f", crew.file("origin.cfg", HAPROXY.replace("PORT", str(port)))]
    )


def node(crew: Crew, port: int) -> Child:
    """Start Node.js."""
    return crew.start("node", [need("node"), crew.file("origin.js", NODE.replace("PORT", str(port)))])


def python(program: str, *words: str) -> Callable[[Crew, int], Child]:
    """Return a function that starts a Python server."""

    def start(crew: Crew, port: int) -> Child:
        crew.file("origin_app.py", APP)
        chosen = [word.format(address=f"{LOOPBACK}:{port}", port=port, folder=crew.folder) for word in words]
        return crew.start(program, ["env", f"PYTHONPATH={crew.folder}", need(program), *chosen])

    return start


ORIGINS: dict[str, Callable[[Crew, int], Child]] = {
    "nginx": nginx,
    "haproxy": haproxy,
    "node": node,
    "uvicorn": python("uvicorn", "--port", "{port}", "--no-access-log", "--no-proxy-headers", "origin_app:asgi"),
    "hypercorn": python("hypercorn", "--bind", "{address}", "origin_app:asgi"),
    "gunicorn": python("gunicorn", "--bind", "{address}", "--worker-class", "gthread", "origin_app:wsgi"),
    "waitress-serve": python(
        "waitress-serve", "--listen", "{address}", "--no-clear-untrusted-proxy-headers", "origin_app:wsgi"
    ),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A response as the visitor reads it."""

    status: int
    path: str  # of the server's answer
    number: int  # which request it was, as the server counts
    forwarded: str


def ask(address: Address, case: Case) -> tuple[list[Answer], bool]:
    """Send a case and the marker. Return the responses, and whether the connection ended behind them."""
    with socket.create_connection(address, timeout=TIMEOUT) as visitor:
        visitor.sendall(case.data + MARKER)
        data = b""
        ended = True
        try:
            while chunk := visitor.recv(65536):
                data += chunk
        except TimeoutError:
            ended = False
        except OSError:
            pass
    answers = []
    for method in (case.method, "GET", "GET"):
        if not data:
            break
        head, _, data = data.partition(b"\r\n\r\n")
        body = b""
        if method != "HEAD":
            if b"transfer-encoding: chunked" in head.lower():
                while size := int(data.partition(b"\r\n")[0], 16):
                    data = data.partition(b"\r\n")[2]
                    body, data = body + data[:size], data[size + 2 :]
                data = data.partition(b"\r\n\r\n")[2]
            else:
                found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
                size = int(found[1]) if found else len(data)
                body, data = data[:size], data[size:]
        path, number, forwarded = [*body.decode("latin-1").split(" ", 2), "", ""][:3]
        answers.append(Answer(int(head.split(b" ")[1]), path, int(number) if number.isdecimal() else 0, forwarded))
    return answers, ended


def judge(case: Case, answers: list[Answer], ended: bool, counted: int | None) -> tuple[str, bool]:
    """Return what happened, and whether the relay and the server agree. `counted`: requests that the server counts."""
    said = " ".join(f"{answer.status} {answer.path}" for answer in answers) + ("" if ended else " (open)")
    said += f", counted {counted}"
    if not ended or any("/smuggled" in answer.path for answer in answers):
        return said, False
    if case.status is not None:
        return said, [answer.status for answer in answers] == [case.status] and counted in (None, 0, 1)
    if len(answers) == 2 and [answer.status for answer in answers] == [200, 200]:
        first, second = answers
        right = second.path == "/marker" and (case.method == "HEAD" or first.path == "/case")
        return said, right and counted in (None, 2) and second.forwarded == LOOPBACK
    return f"the server refuses: {said}", bool(answers) and answers[0].status >= 400 and (counted or 0) <= 2


def compare(name: str, start: Callable[[Crew, int], Child]) -> tuple[int, list[str], list[str]]:
    """Run all cases against one server. Return how many passed, which the server refuses, and disagreements."""
    refused, wrong, passed = [], [], 0
    with Crew() as crew:
        port, http = free_port(), free_port()
        start(crew, port).listening(port)
        config = crew.file("tunnel.toml", CONFIG.format(http=http))
        daemon = crew.start("tunneld", [sys.executable, "-c", TUNNELD, "--config", config, "--log-format", "json"])
        control = daemon.line(
            lambda line: json.loads(line)["uri"] if json.loads(line)["event"] == "control listens" else None
        )
        command = ["expose", str(port), "--relay", control, "--host", "blog", "--quiet"]
        crew.start("tunnel", [sys.executable, "-c", TUNNEL, *command]).line(
            lambda line: line if "blog" in line else None
        )
        probe, _ = ask((LOOPBACK, http), Case(MARKER.replace(b"Connection: close\r\n", b""), method="GET"))
        before = probe[-1].number
        for title, case in cases().items():
            answers, ended = ask((LOOPBACK, http), case)
            probe, _ = ask((LOOPBACK, http), Case(MARKER.replace(b"Connection: close\r\n", b""), method="GET"))
            number = probe[0].number
            counted = None if name == "nginx" else number - before - 1
            if name == "nginx" and case.status is None and len(answers) == 2:
                counted = answers[1].number
            before = probe[-1].number
            said, agree = judge(case, answers, ended, counted)
            passed += agree
            if not agree:
                wrong.append(f"{title}: {said}")
            elif said.startswith("the server"):
                refused.append(f"{title}: {said}")
    return passed, refused, wrong


def main() -> None:
    """Compare all servers that are installed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.origins", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=ORIGINS)
    only = parser.parse_args().only or list(ORIGINS)
    own_network()
    bad = False
    with orphans_ended():
        for name in only:
            if find(name) is None:
                print(f"{name}: not installed")
                continue
            passed, refused, wrong = compare(name, ORIGINS[name])
            print(f"{name}: {passed} of {len(cases())} cases agree; it refuses {len(refused)} that the relay passes on")
            for line in [*(f"    {line}" for line in refused), *(f"  ! {line}" for line in wrong)]:
                print(line)
            bad |= bool(wrong)
    sys.exit(bad)


if __name__ == "__main__":
    main()
