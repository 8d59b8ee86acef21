"""Socket activation, and ports below 1024."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from .agents import AGENT, is_there
from .relay import BASELINE, CONFIG, HTTP, RELAY, RUNNING, SLOW, addresses, ask, serves
from .steps import step
from .tools import WrongError, changed, expect, sh, wait_until

UNITS = Path("/etc/systemd/system")
SOCKETS = "tunneld.socket tunneld-webmux.socket tunneld-http.socket"


@step
def systemd_opens_ports_and_starts_the_daemon() -> Iterator[str]:
    """tunneld.socket and two similar units, below 1024: the first connection starts the daemon without privileges. Over
    a restart, kill -9 and `restart` of the control protocol, the ports and the agent's address are kept.
    """
    wait_until("the agent is there", is_there)
    before = addresses("alice")
    text = (UNITS / "tunneld.socket").read_text()
    for face, port in (("webmux", "443"), ("http", "127.0.0.1:80")):
        (UNITS / f"tunneld-{face}.socket").write_text(text.replace("=7010", f"={port}").replace("=control", f"={face}"))
    AGENT.do("stop")
    RELAY.do("stop")
    sh(f"systemctl enable --now {SOCKETS}")
    expect(RELAY.ActiveState, "inactive", "the daemon before the first connection")
    with socket.create_connection(("127.0.0.1", 7010)):
        RELAY.must_be(RUNNING)
    HTTP[0] = "127.0.0.1:80"
    yield "somebody came, and it runs"
    AGENT.do("start")
    wait_until("the page is there", is_there)
    expect(addresses("alice"), before, "addresses")
    yield sh("ss -Hltnp sport = 443 or sport = 80 or sport = 7010 or sport = 7012")
    RELAY.do("restart")
    took = wait_until("the page is there after a restart", lambda: serves(before[0]))
    yield f"the page is back {took:.0f} s after a restart"
    pid = RELAY.MainPID
    os.kill(int(pid), signal.SIGKILL)
    with socket.create_connection(("127.0.0.1", 7010)):  # not refused
        took = wait_until("the page is there after a crash", lambda: RELAY.MainPID != pid and serves(before[0]))
    yield f"the page is back {took:.0f} s after a crash"
    expect(addresses("alice"), before, "addresses")
    RELAY.listen()
    yield ask("restart")["text"]
    RELAY.must_say("ready ")
    took = wait_until("the page is there after a restart by the daemon itself", lambda: serves(before[0]))
    yield f"the page is back {took:.0f} s after that"
    sh(f"systemctl disable --now {SOCKETS}; systemctl stop tunneld; rm {UNITS}/tunneld-*.socket")
    sh("systemctl daemon-reload")
    HTTP[0] = "127.0.0.1:7011"
    RELAY.do("start")
    wait_until("the page is there without sockets", is_there)


@step
def a_socket_without_a_name_is_reported() -> Iterator[str]:
    """A socket unit without FileDescriptorName=: the daemon does not start, and the journal says what is missing."""
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
    """tunnels.ports below 1024: refused without AmbientCapabilities=CAP_NET_BIND_SERVICE; with it they are opened, also
    after `restart` of the control protocol.
    """
    with changed(CONFIG, BASELINE[0].replace('"20000-29999"', '"443-460"')):
        RELAY.drop_in(SLOW + "AmbientCapabilities=\n")
        RELAY.do("restart")
        try:
            ask("openTunnel", "tcp")
        except WrongError as error:
            yield str(error)
            expect("CAP_NET_BIND_SERVICE" in str(error), True, "what it takes is there")
        else:
            raise WrongError("a port below 1024 without the capability")
        RELAY.drop_in(SLOW)
        RELAY.do("restart")
        yield ask("openTunnel", "tcp", persist="yes")["text"]
        RELAY.listen()
        yield ask("restart")["text"]
        RELAY.must_say("ready ")
        yield ask("openTunnel", "tcp", persist="yes")["text"]
    RELAY.do("restart")
