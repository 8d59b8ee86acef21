"""Ports that systemd opens, and ports below 1024."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from .agents import AGENT
from .relay import CONFIG, HTTP, RELAY, RUNNING, SLOW, addresses, ask, serves
from .steps import step
from .tools import WrongError, expect, sh, wait_until

UNITS = Path("/etc/systemd/system")
SOCKETS = "tunneld.socket tunneld-webmux.socket tunneld-http.socket"


@step
def systemd_opens_ports_and_starts_the_daemon() -> Iterator[str]:
    wait_until("the agent is there", lambda: bool(addresses()))
    before = addresses()
    text = (UNITS / "tunneld.socket").read_text()
    for face, port in (("webmux", "443"), ("http", "127.0.0.1:80")):
        (UNITS / f"tunneld-{face}.socket").write_text(text.replace("=7010", f"={port}").replace("=control", f"={face}"))
    RELAY.do("stop")
    AGENT.do("stop")
    sh(f"systemctl enable --now {SOCKETS}")
    expect(RELAY.ActiveState, "inactive", "the daemon before anybody came")
    with socket.create_connection(("127.0.0.1", 7010)):
        RELAY.must_be(RUNNING)
    HTTP[0] = "127.0.0.1:80"
    AGENT.do("start")
    wait_until("the page is there", lambda: before == addresses() and serves(before[0]))
    RELAY.do("restart")
    wait_until("the page is there after a restart", lambda: serves(before[0]))
    pid = RELAY.MainPID
    os.kill(int(pid), signal.SIGKILL)
    with socket.create_connection(("127.0.0.1", 7010)):  # not refused
        wait_until("the page is there after a crash", lambda: serves(before[0]))
    expect(addresses(), before, "addresses")
    yield ask("restart")["text"]
    RELAY.must_say("taken over")
    wait_until("the page is there after it became another", lambda: serves(before[0]))
    yield sh("ss -Hltnp sport = 443 or sport = 80 or sport = 7010 or sport = 7012")
    sh(f"systemctl disable --now {SOCKETS}; systemctl stop tunneld; rm {UNITS}/tunneld-*.socket")
    sh("systemctl daemon-reload")
    HTTP[0] = "127.0.0.1:7011"
    RELAY.do("start")
    wait_until("the page is there without sockets", lambda: serves(before[0]))


@step
def a_socket_without_a_name_is_a_sentence() -> Iterator[str]:
    odd = UNITS / "tunneld-odd.socket"
    text = (UNITS / "tunneld.socket").read_text()
    odd.write_text(text.replace("=7010", "=7999").replace("FileDescriptorName=control", ""))
    RELAY.do("stop")
    sh("systemctl daemon-reload; systemctl start tunneld-odd.socket")
    RELAY.do("start", status=1)
    yield RELAY.must_say("FileDescriptorName")
    sh(f"systemctl stop tunneld-odd.socket tunneld; rm {odd}; systemctl daemon-reload; systemctl reset-failed tunneld")
    RELAY.do("start")


@step
def tunnels_have_ports_below_1024_with_the_capability() -> Iterator[str]:
    before = CONFIG.read_text()
    CONFIG.write_text(before.replace('"20000-29999"', '"443-460"'))
    RELAY.do("restart")
    try:
        ask("openTunnel", "tcp")
    except WrongError as error:
        yield str(error)
    RELAY.drop_in(SLOW + "AmbientCapabilities=CAP_NET_BIND_SERVICE\n")
    RELAY.do("restart")
    yield str(ask("openTunnel", "tcp", persist="yes"))
    yield ask("restart")["text"]
    RELAY.must_say("taken over")
    yield str(ask("openTunnel", "tcp", persist="yes"))
    CONFIG.write_text(before)
    RELAY.drop_in(SLOW)
    RELAY.do("restart")
