"""The hidden servers, as context managers that yield their addresses."""

from __future__ import annotations

import grp
import os
import pwd
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.processes import LOOPBACK, Address, Crew, free_port, need

PAGE = "0123456789abcdef" * 32  # 512 bytes, so that the request is measured and not the page

NGINX = """
daemon off;
{user}
worker_processes 1;
worker_rlimit_nofile {descriptors};
pid {folder}/pid;
error_log stderr warn;
events {{ worker_connections {connections}; }}
"""

HTTP = """
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    open_file_cache max=16;
    tcp_nopush off;
    sendfile on;
    server {{
        listen {host}:{port} backlog=4096;
        root {folder}/pages;
    }}
}}
"""


def nginx_basics(folder: Path, descriptors: int) -> str:
    """Format the beginning of an nginx configuration: one worker, in the foreground, as the current user."""
    user, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
    return NGINX.format(
        user=f"user {user} {group};" if os.getuid() == 0 else "",  # else it changes to an unprivileged user
        folder=folder,
        descriptors=descriptors,
        connections=descriptors - 64,
    )


def nginx_command(config: Path) -> list[str | Path]:
    """Return the command line that runs nginx with a configuration."""
    return [need("nginx"), "-p", config.parent, "-e", "stderr", "-c", config]


@contextmanager
def page(descriptors: int) -> Iterator[Address]:
    """Run `nginx` with one small static file."""
    with Crew() as crew:
        (crew.folder / "pages").mkdir()
        crew.file("pages/index.html", PAGE)
        port = free_port()
        text = nginx_basics(crew.folder, descriptors) + HTTP.format(folder=crew.folder, host=LOOPBACK, port=port)
        child = crew.start("nginx (http)", nginx_command(crew.file("nginx.conf", text)))
        yield child.listening(port)


@contextmanager
def bulk(_: int) -> Iterator[Address]:
    """Run a server that sends without end."""
    with _hidden("bulk") as address:
        yield address


@contextmanager
def greeter(_: int) -> Iterator[Address]:
    """Run a server that sends one byte and holds the connection."""
    with _hidden("greet") as address:
        yield address


@contextmanager
def _hidden(kind: str) -> Iterator[Address]:
    with Crew() as crew:
        child = crew.start(kind, [sys.executable, "-m", "benchmarks.hidden", kind])
        yield LOOPBACK, child.line(int)
