"""Services of users that expose something."""

from __future__ import annotations

import hashlib
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

from tests.machine.inside.journal import JOURNAL
from tests.machine.inside.relay import BASELINE, CONFIG, RELAY, addresses, serves
from tests.machine.inside.steps import first, step
from tests.machine.inside.tools import changed, expect, sh, wait_until
from tests.machine.inside.units import Unit, no_tracebacks

AGENT = Unit("tunnel.service", "alice")
HOME = Path("/home/alice")
FILE = HOME / ".config/tunneld/expose.toml"
SECRET = FILE.parent / "secret"
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


def is_there() -> bool:
    """Whether visitors of alice's get the page."""
    here = addresses("alice")
    return bool(here) and all(map(serves, here))


@first
def an_agent_is_a_service_of_a_user() -> Iterator[str]:
    """Does what the head of tunnel.service says, as a user who lingers: a visitor gets the page."""
    sh("useradd --create-home alice && loginctl enable-linger alice")
    units = HOME / ".config/systemd/user"
    for folder in (FILE.parent, units, HOME / "page"):
        folder.mkdir(parents=True)
    (HOME / "page/index.html").write_text("a page\n")
    (units / "page.service").write_text(PAGE)
    shutil.copy("/mnt/config/tunnel.service", units)
    shutil.copy("/root/alice", SECRET)
    certificate = ssl.PEM_cert_to_DER_cert(Path("/etc/tunneld/relay.pem").read_text())
    FILE.write_text(EXPOSE.format(pin=hashlib.sha256(certificate).hexdigest()))
    wait_until("alice's manager runs", Path("/run/user/1000/systemd/private").exists)
    AGENT.drop_in("[Service]\nTimeoutStartSec=900\nTimeoutStopSec=900\n")
    sh("chown -R alice: /home/alice")
    sh(f"{AGENT.ctl} daemon-reload && {AGENT.ctl} start page")
    AGENT.do("enable --now")
    yield AGENT.must_say("http://relay")
    wait_until("the page is there", is_there)
    manager = JOURNAL.since(0, lambda line: line.get("_UID") == "1000" and line.get("_COMM") == "systemd")
    odd = [line["MESSAGE"] for line in manager if any(word in line["MESSAGE"] for word in ("nknown", "gnoring"))]
    expect(odd, [], "what alice's systemd complains of")


@step
def the_agent_reloads_as_its_unit_says() -> Iterator[str]:
    """systemctl --user reload after one more exposure, after a mistake, which changes nothing, and after one less."""
    with changed(FILE, FILE.read_text() + "\n[expose.second]\ntarget = 8000\n"):
        AGENT.do("reload")
        wait_until("there are two", lambda: len(addresses("alice")) == 2)
        yield "there are two"
        with changed(FILE, FILE.read_text() + "\n[expse.third]\n"):
            yield AGENT.do("reload", status=1)
            expect((AGENT.ActiveState, len(addresses("alice"))), ("active", 2), "the unit")
    AGENT.do("reload")
    wait_until("there is one", lambda: len(addresses("alice")) == 1)


@step
def the_agent_stops_as_its_unit_says() -> Iterator[str]:
    """systemctl --user stop is a success, and the tunnel is gone then; a start brings it back to its address."""
    wait_until("the agent is there", is_there)
    before = addresses("alice")
    AGENT.do("stop")
    expect((AGENT.state, AGENT.Result, AGENT.ExecMainStatus), ("inactive/dead", "success", "0"), "the unit")
    expect(addresses("alice"), [], "tunnels")
    AGENT.do("start")
    wait_until("the agent is there", is_there)
    expect(addresses("alice"), before, "addresses")
    yield " ".join(before)


@step
def an_agent_with_a_wrong_secret_waits_for_the_right_one() -> Iterator[str]:
    """It says so and goes on as soon as its file has the right one; systemd starts nothing again."""
    AGENT.do("stop")
    with changed(SECRET, "wrong\n"):
        AGENT.do("start")
        yield AGENT.must_say("waiting for a new secret")
        expect((AGENT.state, AGENT.NRestarts), ("active/running", "0"), "the unit")
    took = wait_until("the agent is there", is_there)
    yield f"it is there {took:.0f} s after that"
    expect(AGENT.NRestarts, "0", "restarts")
    no_tracebacks([AGENT])


@step
def an_agent_with_a_bad_file_is_tried_once() -> Iterator[str]:
    """It ends with 78, with the reason in the journal, and systemd leaves it; a right one helps."""
    AGENT.do("stop")
    with changed(FILE, FILE.read_text() + "\n[expse.third]\n"):
        AGENT.do("start")
        wait_until("it has ended", lambda: AGENT.ActiveState == "failed")
        expect((AGENT.ExecMainStatus, AGENT.NRestarts), ("78", "0"), "the unit")
        yield AGENT.must_say("expse")
        expect({line["PRIORITY"] for line in AGENT.journal()}, {"3"}, "priorities")
        no_tracebacks([AGENT])
    AGENT.do("start")
    wait_until("the agent is there", is_there)


@step
def plain_ssh_is_a_service_too() -> Iterator[str]:
    """Does what the head of ssh-tunnel.service says; its address stays over a restart of the relay and its own."""
    home = "/var/lib/ssh-tunnel"
    sh(f"useradd --system --create-home --home-dir {home} ssh-tunnel")
    sh(f"sudo -u ssh-tunnel ssh-keygen -q -t ed25519 -N '' -f {home}/.ssh/id_ed25519")
    sh(f"tunnel credential add door --ssh-key {home}/.ssh/id_ed25519.pub")
    RELAY.do("reload")
    yield sh("sudo -u ssh-tunnel ssh -o StrictHostKeyChecking=accept-new -p 7022 relay.example.org list")
    unit = Unit("ssh-tunnel.service")
    unit.do("enable --now")
    wait_until("ssh is there", lambda: bool(addresses("door")) and all(map(serves, addresses("door"))))
    wait_until("the agent is there", is_there)
    both = addresses("alice", "door")
    for service in (RELAY, unit):
        service.do("restart")
        took = wait_until("both pages are there", lambda: all(map(serves, both)))
        yield f"both are there {took:.0f} s after systemctl restart {service.name}"
        expect(addresses("alice", "door"), both, f"addresses after a restart of {service.name}")
    unit.do("stop")
    expect((unit.ActiveState, unit.Result), ("inactive", "success"), "the unit")
    CONFIG.write_text(BASELINE[0])
    RELAY.do("reload")
