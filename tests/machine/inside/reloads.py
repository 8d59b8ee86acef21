"""Reloads by systemd."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

from tests.machine.inside.relay import BASELINE, CONFIG, RELAY, RUNNING
from tests.machine.inside.steps import step
from tests.machine.inside.tools import changed, expect, sh
from tests.machine.inside.units import no_tracebacks


def port_of_control() -> str:
    """Where it listens, of two ports."""
    return sh("ss -Hltn sport = 7110 or sport = 7010").split()[3].rpartition(":")[2]


@step
def a_reload_changes_ports_and_certificates_at_once() -> Iterator[str]:
    """systemctl reload with another port and another certificate: both are in force when it returns."""
    pid = RELAY.MainPID
    sh("rm -rf /root/other && tunneld init --host relay.example.org --output /root/other")
    sh("cp -a /etc/tunneld /root/before && cp --no-preserve=mode,ownership /root/other/relay.* /etc/tunneld")
    sh("chgrp tunneld /etc/tunneld/* && chmod 640 /etc/tunneld/*")
    with changed(CONFIG, BASELINE[0].replace("port = 7010", "port = 7110")):
        RELAY.do("reload")
        expect(port_of_control(), "7110", "port after systemctl reload")
        shown = ssl.get_server_certificate(("127.0.0.1", 7110))
        expect(shown.strip(), Path("/root/other/relay.pem").read_text().strip(), "certificate after systemctl reload")
        yield from (line["MESSAGE"] for line in RELAY.journal())
    sh("cp -a /root/before/relay.* /etc/tunneld && rm -r /root/before")
    RELAY.do("reload")
    expect((RELAY.MainPID, RELAY.state), (pid, RUNNING), "the process after reloads")


@step
def a_reload_of_a_bad_file_fails_and_changes_nothing() -> Iterator[str]:
    """A table that is none, then a key that the daemon may not read: systemctl reload fails, the daemon goes on, and
    journal and systemctl status say why.
    """
    pid = RELAY.MainPID
    for spoil, mend in (
        (f"echo '[contrl]' >> {CONFIG}", "true"),
        ("chown root: /etc/tunneld/relay.key", "chgrp tunneld /etc/tunneld/relay.key"),
    ):
        with changed(CONFIG, BASELINE[0]):
            sh(spoil)
            RELAY.do("reload", status=1)
            yield RELAY.must_say("reload failed, nothing changed")
            refused = [line["PRIORITY"] for line in RELAY.journal() if "reload failed" in line["MESSAGE"]]
            expect(refused, ["4"], "priority")
            expect((RELAY.state, RELAY.MainPID), (RUNNING, pid), "the unit")
            yield RELAY.StatusText
            expect("reload failed" in RELAY.StatusText, True, f"status {RELAY.StatusText!r}")
            no_tracebacks([RELAY])
            sh(mend)
    RELAY.do("reload")
    RELAY.must_say("SIGHUP")
    expect("reload failed" in RELAY.StatusText, False, f"status {RELAY.StatusText!r}")


@step
def a_reload_to_a_port_that_is_taken_is_in_the_status() -> Iterator[str]:
    """--check opens no port, so systemctl reload cannot fail; but the status tells, and the daemon goes on."""
    pid = RELAY.MainPID
    with socket.create_server(("", 7110)), changed(CONFIG, BASELINE[0].replace("port = 7010", "port = 7110")):
        RELAY.do("reload")
        yield RELAY.must_say("reload failed, nothing changed")
        yield RELAY.StatusText
        expect("address already in use" in RELAY.StatusText, True, f"status {RELAY.StatusText!r}")
        expect((RELAY.state, RELAY.MainPID), (RUNNING, pid), "the unit")
        expect(sh("ss -Hltnp sport = 7010").count("tunneld"), 1, "listeners at the former port")
    RELAY.do("reload")
    RELAY.must_say("SIGHUP")
    expect("reload failed" in RELAY.StatusText, False, f"status {RELAY.StatusText!r}")
