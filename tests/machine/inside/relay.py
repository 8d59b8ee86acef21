"""The relay: installed and started as its unit says, and asked over HTTP, for each `tunnel` takes seconds here."""

from __future__ import annotations

import base64
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.machine.inside.journal import JOURNAL
from tests.machine.inside.steps import first
from tests.machine.inside.tools import PATIENCE, WrongError, expect, sh, wait_until
from tests.machine.inside.units import Unit

RELAY = Unit("tunneld.service")
CONFIG = Path("/etc/tunneld/tunnel.toml")
STATE = Path("/var/lib/tunneld")
RUNNING = "active/running"
HTTP = ["127.0.0.1:7011"]
"""Where the relay's HTTP face is at present."""
SLOW = "[Service]\nWatchdogSec=900\nTimeoutStartSec=900\nTimeoutStopSec=900\n"
"""The machine may stand still for longer than systemd waits elsewhere: its processor is a process of low priority."""
OF_CONTROL = "handshake_timeout = 300.0\n"
DRAIN = "drain_timeout = 600.0"
BASELINE: list[str] = []
"""The configuration, as the first steps leave it."""


def ask(verb: str, *words: str, **options: str) -> dict[str, Any]:
    """A verb of the control protocol, as the operator; waits until somebody answers. Raises `WrongError` where it is
    refused.
    """
    secret = Path("/root/operator").read_text().strip()
    request = urllib.request.Request(
        f"http://{HTTP[0]}/api/v1/{verb}",
        json.dumps({"args": words, "options": options}).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": "Basic " + base64.b64encode(f"operator:{secret}".encode()).decode(),
        },
    )
    answers: list[dict[str, Any]] = []

    def is_answered() -> bool:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                answers.append(json.load(response))
        except urllib.error.HTTPError as error:
            raise WrongError(f"{verb}: {error.read().decode()}") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionRefusedError):
                return False
            raise WrongError(f"{verb}: {error.reason}") from None
        except OSError as error:
            raise WrongError(f"{verb}: {error}") from None
        return True

    wait_until(f"the relay answers {verb}", is_answered)
    return answers[0]


def tcp_tunnel(**options: str) -> tuple[str, str]:
    """A new persistent tunnel of the operator's: server and client URI."""
    server = ask("openTunnel", "tcp", persist="yes", **options)["text"]
    return server, ask("getTunnelAddress", server)["text"]


def addresses(*owners: str) -> list[str]:
    """Where visitors connect, of all tunnels of these credentials."""
    return sorted(item["client"] for item in ask("list")["items"] if item["owner"].partition("@")[0] in owners)


def serves(address: str) -> bool:
    """Whether a visitor gets the page."""
    try:
        with urllib.request.urlopen(address.replace("tcp:", "http:"), timeout=PATIENCE) as response:
            return bool(response.read() == b"a page\n")
    except OSError:
        return False


def put_back() -> None:
    """After a step that failed: all is as the first steps left it, with a new daemon and no tunnel of the operator's.

    Raises `WrongError`.
    """
    HTTP[0] = "127.0.0.1:7011"
    sh("systemctl disable --now 'tunneld*.socket'; rm -f /etc/systemd/system/tunneld-*.socket", status=None)
    sh("systemctl kill --signal=KILL tunneld; systemctl stop tunneld ssh-tunnel", status=None)
    sh(f"while mountpoint -q {STATE}; do umount {STATE}; done; rm -f {STATE}/fill")
    CONFIG.write_text(BASELINE[0])
    RELAY.drop_in(SLOW)
    sh("systemctl reset-failed")
    RELAY.do("start")
    from tests.machine.inside.agents import AGENT, SECRET, is_there  # noqa: PLC0415 - which builds on this here

    SECRET.write_text(Path("/root/alice").read_text())
    AGENT.do("restart")
    wait_until("the agent is there", is_there)


@first
def it_is_installed_as_its_unit_says() -> Iterator[str]:
    """Does what the head of tunneld.service says, as root; systemd-analyze finds nothing wrong with the units."""
    sh("/opt/tunneld/bin/pip install --no-index --no-deps --find-links /mnt/wheels tunneld")
    sh("ln -s /opt/tunneld/bin/tunneld /opt/tunneld/bin/tunnel /usr/local/bin")
    yield sh("tunneld --version")
    sh("useradd --system --no-create-home tunneld")
    sh("tunneld init --host relay.example.org --output /etc/tunneld > /root/line")
    for who, role in (("operator", "admin"), ("alice", "user")):
        sh(f"umask 077; tunnel credential add {who} --role {role} --config {CONFIG} > /root/{who}")
    patient = rf"[daemon]\n{DRAIN}\n\n\g<0>{OF_CONTROL}"
    BASELINE.append(re.sub(r"^\[control\].*\n", patient, CONFIG.read_text(), flags=re.MULTILINE))
    CONFIG.write_text(BASELINE[0])
    sh("chgrp -R tunneld /etc/tunneld && chmod -R u=rwX,g=rX,o= /etc/tunneld")
    sh("cp /mnt/config/*.service /mnt/config/*.socket /etc/systemd/system")
    sh("systemctl daemon-reload")
    expect(sh("systemd-analyze verify --man=no /etc/systemd/system/tunneld.*"), "", "systemd-analyze verify")


@first
def it_is_ready_when_systemd_says_so() -> Iterator[str]:
    """Enables and starts the unit: who it is, what it may do, what it keeps, what the journal and systemctl show."""
    RELAY.drop_in("[Service]\nTimeoutStartSec=900\n")
    RELAY.do("enable --now")
    expect(RELAY.state, RUNNING, "state after systemctl start")
    pid = RELAY.MainPID
    expect(sh(f"ps -o user= -o group= -p {pid}").split(), ["tunneld", "tunneld"], "who it is")
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    expect((status["CapEff"], status["NoNewPrivs"], status["Seccomp"]), ("0" * 16, "1", "2"), "what it may do")
    expect(
        sh(f"stat -c '%U %a' {STATE} {STATE}/reservations.db").split(),
        ["tunneld", "700", "tunneld", "600"],
        "its state",
    )
    expect({line["PRIORITY"] for line in RELAY.journal()}, {"6"}, "priorities of its log")
    expect(RELAY.must_say("listens").split()[0], "info", "the beginning of a line")
    manager = JOURNAL.since(0, lambda line: line.get("_PID") == "1")
    odd = [line["MESSAGE"] for line in manager if any(word in line["MESSAGE"] for word in ("nknown", "gnoring"))]
    expect(odd, [], "what systemd complains of")
    yield sh("systemctl status --no-pager --lines=0 tunneld")
    RELAY.drop_in(SLOW)
    RELAY.do("restart")
