"""Restarts by systemd and by itself, and stops, each in the middle of a transfer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from tests.machine.inside.people import Greeter, Transfer, dial, pair, visitors
from tests.machine.inside.relay import BASELINE, CONFIG, DRAIN, RELAY, RUNNING, ask, tcp_tunnel
from tests.machine.inside.steps import step
from tests.machine.inside.tools import WrongError, changed, expect, sh, wait_until
from tests.machine.inside.units import no_tracebacks

MANY = 1000
"""Relays at once: beyond one message to systemd, and what one of them could hide."""


@step
def systemctl_restart_keeps_a_transfer_and_refuses_no_visitor() -> Iterator[str]:
    """Twice: the transfer's hash is right in the end, and each of many short visitors is greeted."""
    pid = RELAY.MainPID
    greeted = tcp_tunnel()
    with Greeter(greeted[0]), Transfer(*tcp_tunnel()) as transfer, visitors(greeted[1]) as people:
        for _ in range(2):
            began = time.monotonic()
            RELAY.do("restart")
            yield f"systemctl restart took {time.monotonic() - began:.0f} s"
            transfer.must_move()
            people.more_must_come()
            expect((RELAY.Result, RELAY.NFileDescriptorStore, RELAY.NRestarts), ("success", "0", "0"), "the unit")
    expect(set(people.answers), {"hello"}, "what visitors got")
    expect(RELAY.MainPID != pid, True, "another process")
    no_tracebacks([RELAY])
    yield f"{transfer.octets >> 10} KiB and {len(people.answers)} visitors"


@step
def a_restart_while_the_last_one_still_starts_keeps_a_transfer() -> Iterator[str]:
    """systemctl restart as soon as the new process is there, which has no handler for its signal yet: no failure."""
    with Transfer(*tcp_tunnel()) as transfer:
        RELAY.do("restart --no-block")
        wait_until("it starts", lambda: RELAY.SubState == "start", every=0.02)
        sh("systemctl restart tunneld")
        transfer.must_move()
    expect((RELAY.state, RELAY.Result, RELAY.NRestarts), (RUNNING, "success", "0"), "the unit")
    yield RELAY.of_manager()


@step
def tunnel_restart_keeps_a_transfer_and_the_process() -> Iterator[str]:
    """The same by `restart` of the control protocol: systemd notices nothing, and the process has the same number."""
    pid = RELAY.MainPID
    greeted = tcp_tunnel()
    with Greeter(greeted[0]), Transfer(*tcp_tunnel()) as transfer, visitors(greeted[1]) as people:
        RELAY.listen()
        yield ask("restart")["text"]
        yield RELAY.must_say("taken over")
        yield RELAY.must_say("ready ")
        expect(RELAY.state, RUNNING, "the unit")
        transfer.must_move()
        people.more_must_come()
    expect(set(people.answers), {"hello"}, "what visitors got")
    expect((RELAY.MainPID, RELAY.NRestarts), (pid, "0"), "the process")
    expect(sh(f"cat /proc/{pid}/comm"), "tunneld", "its name")
    no_tracebacks([RELAY])


@step
def systemctl_restart_keeps_a_thousand_relays() -> Iterator[str]:
    """Each of them says something before and after."""
    server, client = tcp_tunnel()
    pairs = [pair(server, client) for _ in range(MANY)]
    yield f"{MANY} relays"
    RELAY.do("restart")
    for hidden, visitor in pairs:
        hidden.sendall(b"y")
        expect(visitor.recv(1), b"y", "what came after the restart")
        hidden.close()
        visitor.close()
    yield RELAY.must_say("taken over")


@step
def systemctl_stop_drains() -> Iterator[str]:
    """A transfer goes on and ends in order, newcomers are refused, systemctl status says how many are left."""
    server, client = tcp_tunnel()
    stopping = threading.Thread(target=RELAY.do, args=["stop"], daemon=True)
    with Transfer(server, client) as transfer:
        RELAY.listen()
        stopping.start()
        yield RELAY.must_say("draining")
        wait_until("the status says so", lambda: "1 visitor left" in RELAY.StatusText)
        yield RELAY.StatusText
        transfer.must_move()
        try:
            dial(client).close()
        except ConnectionRefusedError:
            yield "newcomers are refused"
        else:
            raise WrongError("a newcomer was accepted")
    stopping.join()
    expect((RELAY.ActiveState, RELAY.Result, RELAY.ExecMainStatus), ("inactive", "success", "0"), "the unit")
    no_tracebacks([RELAY])
    RELAY.do("start")


@step
def a_drain_that_cuts_is_no_failure() -> Iterator[str]:
    """drain_timeout of a second: the transfer is cut, the exit status is 75, the unit has not failed."""
    with changed(CONFIG, BASELINE[0].replace(DRAIN, "drain_timeout = 1.0")):
        RELAY.do("reload")
        with Transfer(*tcp_tunnel()) as transfer:
            RELAY.do("stop")
            transfer.may_be_cut = True
    expect((RELAY.ActiveState, RELAY.Result, RELAY.ExecMainStatus), ("inactive", "success", "75"), "the unit")
    yield from (line["MESSAGE"] for line in RELAY.journal()[-2:])
    no_tracebacks([RELAY])
    RELAY.do("start")


@step
def a_restart_with_a_bad_file_loses_nobody() -> Iterator[str]:
    """`restart` of the control protocol is refused and the daemon goes on; systemctl restart fails, with the reason in
    the journal, and a transfer stands still until the file is mended.
    """
    with Transfer(*tcp_tunnel()) as transfer:
        with changed(CONFIG, BASELINE[0] + "[contrl]\n"):
            try:
                ask("restart")
            except WrongError as error:
                yield str(error)
                expect("unrecognized table" in str(error), True, "the reason is there")
            expect(RELAY.state, RUNNING, "the unit")
            RELAY.do("restart", status=1)
            yield RELAY.must_say("contrl")
            yield RELAY.must_say("are kept until")
            wait_until("systemd tries again", lambda: int(RELAY.NRestarts) > 1)
            yield f"{RELAY.state} after {RELAY.NRestarts} tries, {RELAY.NFileDescriptorStore} descriptors are kept"
        RELAY.must_be(RUNNING)
        transfer.must_move()
        yield RELAY.must_say("taken over")
    no_tracebacks([RELAY])


@step
def a_start_with_a_bad_file_is_tried_once() -> Iterator[str]:
    """Nobody waits for it, so the unit has failed, with the reason in the journal."""
    RELAY.do("stop")
    with changed(CONFIG, BASELINE[0] + "[contrl]\n"):
        RELAY.do("start", status=1)
        expect((RELAY.ActiveState, RELAY.ExecMainStatus, RELAY.NRestarts), ("failed", "78", "0"), "the unit")
        yield RELAY.must_say("contrl")
        no_tracebacks([RELAY])
    RELAY.do("start")
