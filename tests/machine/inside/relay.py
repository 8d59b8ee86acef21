"""The relay: installed and started as its unit says, and asked over HTTP, for each `tunnel` takes seconds here."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .steps import always, step
from .tools import PATIENCE, Unit, WrongError, expect, sh, wait_until

RELAY = Unit("tunneld.service")
CONFIG = Path("/etc/tunneld/tunnel.toml")
RUNNING = "active/running"
HTTP = ["127.0.0.1:7011"]
"""Where the relay's HTTP face is at present."""
SLOW = "[Service]\nWatchdogSec=600\n"
"""The machine may stand still for longer than the watchdog waits: its processor is a process of low priority."""


def ask(verb: str, *words: str, **options: str) -> dict[str, Any]:
    """A verb of the control protocol, as the operator. Raises `WrongError` where nobody answers, or refuses."""
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

    def asked() -> bool:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                answers.append(json.load(response))
        except urllib.error.HTTPError as error:
            raise WrongError(f"{verb}: {error.read().decode()}") from None
        except OSError:
            return False
        return True

    wait_until(f"the relay answers {verb}", asked)
    return answers[0]


def tcp_tunnel(**options: str) -> tuple[str, str]:
    """A new persistent tunnel of the operator's: server and client URI."""
    server = ask("openTunnel", "tcp", persist="yes", **options)["text"]
    return server, ask("getTunnelAddress", server)["text"]


def addresses() -> list[str]:
    """Where visitors connect, of all tunnels."""
    return sorted(item["client"] for item in ask("list")["items"])


def serves(address: str) -> bool:
    """Whether a visitor gets the page."""
    try:
        with urllib.request.urlopen(address.replace("tcp:", "http:"), timeout=PATIENCE) as response:
            return bool(response.read() == b"a page\n")
    except OSError:
        return False


@always
def it_is_installed_as_its_unit_says() -> Iterator[str]:
    sh("test -e /opt/tunneld || python3 -m venv /opt/tunneld")
    sh("/opt/tunneld/bin/pip install --no-index --find-links /mnt/wheels tunneld")
    sh("ln -s /opt/tunneld/bin/tunneld /opt/tunneld/bin/tunnel /usr/local/bin")
    sh("useradd --system --no-create-home tunneld")
    sh("tunneld init --host relay.example.org --output /etc/tunneld > /root/line")
    for who, role in (("operator", "admin"), ("alice", "user")):
        sh(f"umask 077; tunnel credential add {who} --role {role} --config {CONFIG} > /root/{who}")
    sh(f"sed -i 's/^.control.  .*/&\\nhandshake_timeout = 90.0/' {CONFIG}")  # a slow machine
    sh("chgrp -R tunneld /etc/tunneld && chmod -R u=rwX,g=rX,o= /etc/tunneld")
    sh("cp /mnt/config/*.service /mnt/config/*.socket /etc/systemd/system")
    sh("systemctl daemon-reload")
    yield sh("grep handsh /etc/tunneld/tunnel.toml")
    expect(sh("systemd-analyze verify --man=no /etc/systemd/system/tunneld.*"), "", "systemd-analyze verify")


@always
def it_is_ready_when_systemd_says_so() -> Iterator[str]:
    RELAY.do("enable --now")
    expect(f"{RELAY.ActiveState}/{RELAY.SubState}", RUNNING, "state after systemctl start")
    pid = RELAY.MainPID
    expect(sh(f"ps -o user= -o group= -p {pid}").split(), ["tunneld", "tunneld"], "who it is")
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    expect((status["CapEff"], status["NoNewPrivs"], status["Seccomp"]), ("0" * 16, "1", "2"), "what it may do")
    expect(
        sh("stat -c '%U %a' /var/lib/tunneld /var/lib/tunneld/reservations.db").split(),
        ["tunneld", "700", "tunneld", "600"],
        "its state",
    )
    expect({line["PRIORITY"] for line in RELAY.journal()}, {"6"}, "priorities of its log")
    expect(RELAY.must_say("listens").split()[0], "info", "the beginning of a line")
    expect(
        sh("journalctl -b -o cat _PID=1 | grep -i -e 'unknown' -e 'ignoring' -e 'failed to'", status=1),
        "",
        "what systemd complains of",
    )
    RELAY.drop_in(SLOW)
    yield sh("systemctl restart tunneld")


@step
def a_reload_changes_ports_and_certificates_at_once() -> None:
    before, pid = CONFIG.read_text(), RELAY.MainPID
    sh("tunneld init --host relay.example.org --output /root/other")
    sh("cp --no-preserve=mode,ownership /root/other/relay.* /etc/tunneld")
    sh("chgrp tunneld /etc/tunneld/* && chmod 640 /etc/tunneld/*")
    CONFIG.write_text(before.replace("port = 7010", "port = 7110"))
    RELAY.do("reload")
    expect(
        sh("ss -Hltn sport = 7110 or sport = 7010").split()[3].rpartition(":")[2], "7110", "port after systemctl reload"
    )
    shown = ssl.get_server_certificate(("127.0.0.1", 7110))
    expect(shown.strip(), Path("/root/other/relay.pem").read_text().strip(), "certificate after systemctl reload")
    CONFIG.write_text(before)
    RELAY.do("reload")
    expect(RELAY.MainPID, pid, "MainPID after reloads")


@step
def a_reload_of_a_bad_file_fails_and_changes_nothing() -> None:
    before, pid = CONFIG.read_text(), RELAY.MainPID
    for spoil, mend in (
        (f"echo '[contrl]' >> {CONFIG}", "true"),
        ("chown root: /etc/tunneld/relay.key", "chgrp tunneld /etc/tunneld/relay.key"),
    ):
        sh(spoil)
        RELAY.do("reload", status=1)
        RELAY.must_say("reload failed, nothing changed")
        expect([line["PRIORITY"] for line in RELAY.journal() if "reload failed" in line["MESSAGE"]], ["4"], "priority")
        expect((f"{RELAY.ActiveState}/{RELAY.SubState}", RELAY.MainPID), (RUNNING, pid), "the unit")
        sh(mend)
        CONFIG.write_text(before)
    RELAY.do("reload")
