"""What an operator finds at three in the morning: a port that is taken, a full disk, a clock that jumps, a certificate
whose time is over, no descriptors, no memory.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.machine.inside.agents import is_there
from tests.machine.inside.people import Transfer, dial, pair
from tests.machine.inside.relay import RELAY, RUNNING, SLOW, STATE, addresses, ask, serves, tcp_tunnel
from tests.machine.inside.steps import step
from tests.machine.inside.tools import expect, sh, wait_until
from tests.machine.inside.units import no_tracebacks

ROOM = "256k"
"""Of the small disk: the file of reservations fits in, and little else."""
DAY = 86400
EXPIRED = """
import datetime, pathlib
from tunneld.cli.papers import LIFE, make_papers
papers = make_papers("relay.example.org", datetime.datetime.now(datetime.UTC) - LIFE - datetime.timedelta(days=1))
pathlib.Path("/etc/tunneld/relay.pem").write_bytes(papers.certificate)
pathlib.Path("/etc/tunneld/relay.key").write_bytes(papers.key)
"""


@step
def a_port_that_is_taken_is_waited_for() -> Iterator[str]:
    """Somebody else has the control port when the daemon starts: an error in the journal, and systemd tries again until
    the port is free.
    """
    RELAY.do("stop")
    with socket.create_server(("", 7010)):
        RELAY.do("start", status=1)
        yield RELAY.must_say("address already in use")
        expect([line["PRIORITY"] for line in RELAY.journal() if "in use" in line["MESSAGE"]][:1], ["3"], "priority")
        no_tracebacks([RELAY])
        wait_until("systemd has tried again", lambda: int(RELAY.NRestarts) >= 2)
        yield f"{RELAY.state} after {RELAY.NRestarts} tries"
    RELAY.must_be(RUNNING)
    wait_until("the agent is there", is_there)
    yield RELAY.of_manager()


@step
def a_full_disk_costs_nobody_anything() -> Iterator[str]:
    """No room in /var/lib/tunneld: tunnels open and serve, journal and status say what is not stored, until it is."""
    with _small_disk():
        sh(f"head -c 1M /dev/zero > {STATE}/fill", status=None)
        RELAY.listen()
        server, client = tcp_tunnel(name="during")
        yield RELAY.must_say("could not store reservations")
        hidden, visitor = pair(server, client)
        hidden.close()
        visitor.close()
        wait_until("the status says so", lambda: "not stored" in RELAY.StatusText)
        yield RELAY.StatusText
        sh(f"rm {STATE}/fill")
        yield RELAY.must_say("reservations are stored again")
        wait_until("the status says so", lambda: "not stored" not in RELAY.StatusText)
        no_tracebacks([RELAY])


@step
def a_disk_that_is_read_only_costs_nobody_anything() -> Iterator[str]:
    """The same with a disk that became read-only, as broken ones do, before a start: it starts, and tunnels open."""
    with _small_disk():
        RELAY.do("stop")
        sh(f"mount -o remount,ro {STATE}")
        RELAY.do("start")
        yield RELAY.must_say("reservations are kept in memory only")
        server, client = tcp_tunnel(name="during")
        hidden, visitor = pair(server, client)
        hidden.close()
        visitor.close()
        wait_until("the status says so", lambda: "not stored" in RELAY.StatusText)
        yield RELAY.StatusText
        no_tracebacks([RELAY])


@contextmanager
def _small_disk() -> Iterator[None]:
    """Under the daemon's state."""
    RELAY.do("stop")
    sh(f"mount -t tmpfs -o size={ROOM},mode=0700,uid=tunneld,gid=tunneld tmpfs {STATE}")
    RELAY.do("start")
    yield
    RELAY.do("stop")
    sh(f"umount {STATE}")
    RELAY.do("start")


@step
def a_certificate_whose_time_is_over_is_told() -> Iterator[str]:
    """A reload with one that has expired: an error in the journal and in the status; agents that check are told."""
    sh("cp -a /etc/tunneld /root/before")
    sh(f"/opt/tunneld/bin/python - <<'END'{EXPIRED}END")
    RELAY.do("reload")
    yield RELAY.must_say("clients reject the certificate")
    wait_until("the status says so", lambda: "has expired" in RELAY.StatusText)
    yield RELAY.StatusText
    yield sh(
        "tunnel list --relay tls://relay.example.org:7010 --ca /etc/tunneld/relay.pem --credential operator",
        status=None,
        TUNNEL_SECRET="whatever",
    )
    sh("cp -a /root/before/relay.* /etc/tunneld && rm -r /root/before")
    RELAY.do("reload")
    expect("certificate" in RELAY.StatusText, False, f"status {RELAY.StatusText!r}")
    no_tracebacks([RELAY])


@step
def a_clock_that_jumps_is_not_noticed() -> Iterator[str]:
    """A year ahead and back, in the middle of a transfer: nothing ends; all addresses are the same after a kill -9."""
    wait_until("the agent is there", is_there)
    before, pid, real = addresses("alice"), RELAY.MainPID, time.time() - time.monotonic()
    RELAY.listen()
    with Transfer(*tcp_tunnel(name="during")) as transfer:
        for days in (365, 0):
            time.clock_settime(time.CLOCK_REALTIME, real + time.monotonic() + days * DAY)
            yield sh("date")
            transfer.must_move()
            expect(all(map(serves, before)), True, "the page is there")
    expect((RELAY.MainPID, RELAY.state), (pid, RUNNING), "the process")
    no_tracebacks([RELAY])
    os.kill(int(pid), signal.SIGKILL)
    wait_until("there is another", lambda: RELAY.MainPID not in {pid, "0"})
    wait_until("the agent is there", is_there)
    expect(addresses("alice"), before, "addresses")


@step
def without_descriptors_the_operator_is_still_heard() -> Iterator[str]:
    """LimitNOFILE=256 and more visitors than that: they wait, the operator asks and closes, and then all is well."""
    RELAY.drop_in(SLOW + "LimitNOFILE=256\n")
    RELAY.do("restart")
    server, client = tcp_tunnel()
    crowd: list[socket.socket] = []
    with suppress(TimeoutError):
        for _ in range(300):
            crowd += [dial(server), dial(client)]
    yield RELAY.must_say("could not accept connections")
    items = ask("list")["items"]
    yield f"{items[-1]['visitors']} visitors are served, {len(crowd) // 2} came"
    yield f"{ask('status')['items'][0]['descriptors']} descriptors"
    expect(RELAY.state, RUNNING, "the unit")
    ask("close", client)
    for one in crowd:
        one.close()
    hidden, visitor = pair(*tcp_tunnel())
    hidden.close()
    visitor.close()
    wait_until("the agent is there", is_there)
    no_tracebacks([RELAY])
    yield f"{len([line for line in RELAY.journal() if 'could not accept' in line['MESSAGE']])} lines about it"
    RELAY.drop_in(SLOW)
    RELAY.do("restart")


@step
def a_daemon_without_memory_is_killed_and_comes_back() -> Iterator[str]:
    """MemoryMax= below what it needs: the kernel ends it, systemd says why, and starts it again until there is more."""
    wait_until("the agent is there", is_there)
    before, pid, has = addresses("alice"), RELAY.MainPID, int(RELAY.MemoryCurrent)
    RELAY.listen()
    sh(f"systemctl set-property --runtime tunneld MemorySwapMax=0 MemoryMax={has // 2}")
    for _ in range(20):
        with suppress(OSError), socket.create_connection(("127.0.0.1", 7010), timeout=10) as connection:
            connection.sendall(b"x" * 1000)
    wait_until("it is killed", lambda: RELAY.MainPID != pid)
    yield f"{RELAY.state}, {RELAY.Result}"
    sh("rm -r /run/systemd/system.control/tunneld.service.d; systemctl daemon-reload")
    RELAY.must_be(RUNNING)
    wait_until("the agent is there", is_there)
    expect(addresses("alice"), before, "addresses")
    yield RELAY.of_manager()
