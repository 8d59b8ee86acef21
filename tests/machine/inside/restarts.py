"""Restarts by systemd and by itself, and stops, each in the middle of a transfer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from .relay import CONFIG, RELAY, RUNNING, ask, tcp_tunnel
from .steps import step
from .tools import Greeter, Transfer, WrongError, dial, expect, sh, visitors, wait_until


@step
def systemctl_restart_keeps_a_transfer_and_refuses_no_visitor() -> Iterator[str]:
    pid = RELAY.MainPID
    greeted = tcp_tunnel()
    with Greeter(greeted[0]), Transfer(*tcp_tunnel()) as transfer, visitors(greeted[1]) as answers:
        for _ in range(2):
            began = time.monotonic()
            RELAY.do("restart")
            yield f"it took {time.monotonic() - began:.0f} s"
            transfer.must_move()
            count = len(answers)
            wait_until("visitors are greeted", lambda: len(answers) > count + 3)  # noqa: B023
            expect((RELAY.Result, RELAY.NFileDescriptorStore, RELAY.NRestarts), ("success", "0", "0"), "the unit")
    expect(set(answers), {"hello"}, "what visitors got")
    expect(RELAY.MainPID != pid, True, "another process")
    yield f"{transfer.octets >> 10} KiB and {len(answers)} visitors"


@step
def two_restarts_at_once_keep_a_transfer() -> Iterator[str]:
    with Transfer(*tcp_tunnel()) as transfer:
        RELAY.do("restart --no-block")
        wait_until("one begins", lambda: RELAY.SubState == "start")
        sh("systemctl restart tunneld")
        transfer.must_move()
    expect((RELAY.Result, RELAY.NRestarts), ("success", "0"), "the unit")
    yield sh("journalctl -b -o cat _PID=1 | grep -e 'code=killed' -e 'Failed with' | tail -2", status=None)


@step
def tunnel_restart_keeps_a_transfer_and_the_process() -> Iterator[str]:
    pid = RELAY.MainPID
    greeted = tcp_tunnel()
    RELAY.do("is-active")
    with Greeter(greeted[0]), Transfer(*tcp_tunnel()) as transfer, visitors(greeted[1]) as answers:
        yield ask("restart")["text"]
        RELAY.must_say("taken over")
        RELAY.must_be(RUNNING)
        transfer.must_move()
        count = len(answers)
        wait_until("visitors are greeted", lambda: len(answers) > count + 3)
    expect(set(answers), {"hello"}, "what visitors got")
    expect((RELAY.MainPID, RELAY.NRestarts), (pid, "0"), "the process")
    expect(sh(f"cat /proc/{pid}/comm"), "tunneld", "its name")


@step
def systemctl_restart_keeps_a_thousand_relays() -> Iterator[str]:
    server, client = tcp_tunnel()
    pairs = []
    for _ in range(1000):
        hidden, visitor = dial(server), dial(client)
        hidden.sendall(b"x")
        visitor.recv(1)
        pairs.append((hidden, visitor))
    RELAY.do("restart")
    for hidden, visitor in pairs:
        hidden.sendall(b"y")
        expect(visitor.recv(1), b"y", "what came after the restart")
        hidden.close()
        visitor.close()
    yield RELAY.must_say("taken over")


@step
def systemctl_stop_drains() -> Iterator[str]:
    server, client = tcp_tunnel()
    stopping = threading.Thread(target=RELAY.do, args=["stop"], daemon=True)
    with Transfer(server, client) as transfer:
        stopping.start()
        RELAY.must_say("draining")
        wait_until("the status says so", lambda: "visitors left" in RELAY.StatusText)
        yield RELAY.StatusText
        transfer.must_move()
        try:
            dial(client).close()
        except ConnectionRefusedError:
            yield "newcomers are refused"
    stopping.join()
    expect((RELAY.ActiveState, RELAY.Result, RELAY.ExecMainStatus), ("inactive", "success", "0"), "the unit")
    RELAY.do("start")


@step
def a_drain_that_cuts_is_no_failure() -> None:
    before = CONFIG.read_text()
    CONFIG.write_text(before + "\n[daemon]\ndrain_timeout = 5\n")
    RELAY.do("reload")
    with Transfer(*tcp_tunnel()) as transfer:
        RELAY.do("stop")
        transfer.may_be_cut = True
    expect((RELAY.ActiveState, RELAY.Result, RELAY.ExecMainStatus), ("inactive", "success", "75"), "the unit")
    CONFIG.write_text(before)
    RELAY.do("start")


@step
def a_restart_with_a_bad_file_is_tried_once() -> None:
    before = CONFIG.read_text()
    CONFIG.write_text(before + "[contrl]\n")
    try:
        ask("restart")
    except WrongError as error:
        expect("unrecognized table" in str(error), True, str(error))
    RELAY.must_be(RUNNING)
    RELAY.do("restart", status=1)
    expect((RELAY.ActiveState, RELAY.ExecMainStatus, RELAY.NRestarts), ("failed", "78", "0"), "the unit")
    CONFIG.write_text(before)
    RELAY.do("start")
