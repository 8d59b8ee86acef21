"""Services that expose something, and what becomes of their addresses when the relay dies."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from .relay import RELAY, RUNNING, SLOW, addresses, serves
from .steps import always, step
from .tools import Unit, expect, sh, wait_until

AGENT = Unit("tunnel.service", "alice")
HOME = Path("/home/alice")
FILE = HOME / ".config/tunneld/expose.toml"
EXPOSE = """
[relay]
where = "tls://relay.example.org:7010"
pin = "sha256:{pin}"
credential = "alice"
secret_file = "secret"

[expose.blog]
target = 8000
scheme = "http"
"""
PAGE = """
[Service]
ExecStart=python3 -m http.server 8000 --bind 127.0.0.1 --directory %h/page
"""


@always
def an_agent_is_a_service_of_a_user() -> Iterator[str]:
    sh("useradd --create-home alice && loginctl enable-linger alice")
    units = HOME / ".config/systemd/user"
    for folder in (FILE.parent, units, HOME / "page"):
        folder.mkdir(parents=True)
    (HOME / "page/index.html").write_text("a page\n")
    (units / "page.service").write_text(PAGE)
    shutil.copy("/mnt/config/tunnel.service", units)
    shutil.copy("/root/alice", FILE.parent / "secret")
    certificate = ssl.PEM_cert_to_DER_cert(Path("/etc/tunneld/relay.pem").read_text())
    FILE.write_text(EXPOSE.format(pin=hashlib.sha256(certificate).hexdigest()))
    sh("chown -R alice: /home/alice")
    wait_until("alice's manager runs", lambda: Path("/run/user/1000/systemd/private").exists())
    sh(f"{AGENT.ctl} daemon-reload && {AGENT.ctl} start page")
    AGENT.do("enable --now")
    AGENT.must_say("http://relay")
    expect(
        sh("journalctl -b -o cat _UID=1000 _COMM=systemd | grep -i -e unknown -e ignoring", status=1),
        "",
        "what systemd complains of",
    )
    (address,) = addresses()
    wait_until("the page is there", lambda: serves(address))
    yield "\n".join(line["MESSAGE"] for line in AGENT.journal())


@step
def the_agent_reloads_and_stops_as_its_unit_says() -> None:
    before, secret = FILE.read_text(), FILE.parent / "secret"
    FILE.write_text(before + "\n[expose.second]\ntarget = 8000\n")
    AGENT.do("reload")
    wait_until("there are two", lambda: len(addresses()) == 2)
    FILE.write_text(before + "\n[expse.second]\n")
    AGENT.do("reload", status=1)
    expect((AGENT.ActiveState, len(addresses())), ("active", 2), "the unit")
    FILE.write_text(before)
    AGENT.do("reload")
    wait_until("there is one", lambda: len(addresses()) == 1)
    AGENT.do("stop")
    expect((AGENT.Result, AGENT.ExecMainStatus, addresses()), ("success", "0", []), "the unit")
    right = secret.read_text()
    secret.write_text("wrong\n")
    AGENT.do("start")
    wait_until("it has ended", lambda: AGENT.ActiveState == "failed")
    expect((AGENT.ExecMainStatus, AGENT.NRestarts), ("77", "0"), "the unit")
    secret.write_text(right)
    AGENT.do("start")
    AGENT.must_say("http://relay")


@step
def a_daemon_that_is_killed_comes_back_and_so_do_addresses() -> Iterator[str]:
    yield from _is_back_after(signal.SIGKILL)
    expect(RELAY.NRestarts, "1", "restarts")


@step
def a_daemon_that_hangs_is_killed_by_the_watchdog_and_comes_back() -> Iterator[str]:
    RELAY.drop_in("")
    RELAY.do("restart")
    wait_until("the page is there", lambda: serves(addresses()[0]))
    yield from _is_back_after(signal.SIGSTOP)
    yield RELAY.must_say("most recent call first")
    RELAY.drop_in(SLOW)
    RELAY.do("restart")


def _is_back_after(what: signal.Signals) -> Iterator[str]:
    wait_until("the agent is there", lambda: bool(addresses()))
    before, pid = addresses(), RELAY.MainPID
    RELAY.do("is-active")
    began = time.monotonic()
    os.kill(int(pid), what)
    wait_until("there is another", lambda: RELAY.MainPID not in {pid, "0"})
    yield f"another process after {time.monotonic() - began:.0f} s"
    RELAY.must_be(RUNNING)
    wait_until("the page is back", lambda: serves(before[0]))
    yield f"the page after {time.monotonic() - began:.0f} s"
    expect(addresses(), before, "addresses")


@step
def plain_ssh_is_a_service_too() -> Iterator[str]:
    home = "/var/lib/ssh-tunnel"
    sh(f"useradd --system --create-home --home-dir {home} ssh-tunnel")
    sh(f"sudo -u ssh-tunnel ssh-keygen -q -t ed25519 -N '' -f {home}/.ssh/id_ed25519")
    sh(f"tunnel credential add door --ssh-key {home}/.ssh/id_ed25519.pub")
    RELAY.do("reload")
    yield sh("sudo -u ssh-tunnel ssh -o StrictHostKeyChecking=accept-new -p 7022 relay.example.org list")
    unit = Unit("ssh-tunnel.service")
    unit.do("enable --now")
    wait_until("the agent and ssh are there", lambda: len(addresses()) == 2)
    both = addresses()
    for service in (RELAY, unit):
        service.do("restart")
        wait_until("both pages are there", lambda: all(map(serves, both)))
        expect(addresses(), both, f"addresses after a restart of {service.name}")
    unit.do("stop")
    expect((unit.ActiveState, unit.Result), ("inactive", "success"), "the unit")
