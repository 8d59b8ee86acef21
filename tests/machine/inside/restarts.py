"""Restarts by systemd and by the daemon itself, and stops, each in the middle of a transfer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from .relay import BASELINE, CONFIG, DRAIN, RELAY, RUNNING, ask, tcp_tunnel
from .steps import step
from .tools import WrongError, changed, expect, sh, wait_until
from .traffic import Greeter, Transfer, dial, pair, visitors
from .units import no_tracebacks

MANY = 1000
"""Relayed connections at the same time: more than one message to systemd can carry."""


@step
def systemctl_restart_keeps_a_transfer_and_refuses_no_visitor() -> Iterator[str]:
    """Twice: the hash of the transfer is right in the end, and each of many short visitors is served."""
    pid = RELAY.MainPID
    greeted = tcp_tunnel()
    with Greeter(greeted[0]), Transfer(*tcp_tunnel()) as transfer, visitors(greeted[1]) as clients:
        for _ in range(2):
            began = time.monotonic()
            RELAY.do("restart")
            yield f"systemctl restart took {time.monotonic() - began:.0f} s"
            transfer.must_move()
            clients.more_must_come()
            expect((RELAY.Result, RELAY.NFileDescriptorStore, RELAY.NRestarts), ("success", "0", "0"), "the unit")
    expect(set(clients.answers), {"hello"}, "what visitors got")
    expect(RELAY.MainPID != pid, True, "another process")
    no_tracebacks([RELAY])
    yield f"{transfer.octets >> 10} KiB and {len(clients.answers)} visitors"


@step
def a_restart_during_the_start_of_the_previous_one_keeps_a_transfer() -> Iterator[str]:
    """systemctl restart as soon as the new process exists, before it handles the signal: no failure."""
    with Transfer(*tcp_tunnel()) as transfer:
        RELAY.do("restart --no-block")
        wait_until("it starts", lambda: RELAY.SubState == "start", every=0.02)
        sh("systemctl restart tunneld")
        transfer.must_move()
    expect((RELAY.state, RELAY.Result, RELAY.NRestarts), (RUNNING, "success", "0"), "the unit")
    yield RELAY.of_manager()


@step
def tunnel_restart_keeps_a_transfer_and_the_process() -> Iterator[str]:
    """The same with `restart` of the control protocol: systemd notices nothing, and the process id is the same."""
    pid = RELAY.MainPID
    greeted = tcp_tunnel()
    with Greeter(greeted[0]), Transfer(*tcp_tunnel()) as transfer, visitors(greeted[1]) as clients:
        RELAY.listen()
        yield ask("restart")["text"]
        yield RELAY.must_say("taken over")
        yield RELAY.must_say("ready ")
        expect(RELAY.state, RUNNING, "the unit")
        transfer.must_move()
        clients.more_must_come()
    expect(set(clients.answers), {"hello"}, "what visitors got")
    expect((RELAY.MainPID, RELAY.NRestarts), (pid, "0"), "the process")
    expect(sh(f"cat /proc/{pid}/comm"), "tunneld", "its name")
    no_tracebacks([RELAY])


@step
def systemctl_restart_keeps_a_thousand_connections() -> Iterator[str]:
    """Each of them transfers data before and after."""
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
    """A transfer continues and finishes, new visitors are refused, systemctl status shows how many visitors remain."""
    server, client = tcp_tunnel()
    stopping = threading.Thread(target=RELAY.do, args=["stop"], daemon=True)
    with Transfer(server, client) as transfer:
        RELAY.listen()
        stopping.start()
        yield RELAY.must_say("draining")
        wait_until("the status says so", lambda: "1 visitor still connected" in RELAY.StatusText)
        yield RELAY.StatusText
        transfer.must_move()
        try:
            dial(client).close()
        except ConnectionRefusedError:
            yield "new visitors are refused"
        else:
            raise WrongError("a new visitor was accepted")
    stopping.join()
    expect((RELAY.ActiveState, RELAY.Result, RELAY.ExecMainStatus), ("inactive", "success", "0"), "the unit")
    no_tracebacks([RELAY])
    RELAY.do("start")


@step
def a_drain_that_cuts_connections_is_no_failure() -> Iterator[str]:
    """With a drain_timeout of one second the transfer is cut, the exit status is 75, and the unit has not failed."""
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
def a_restart_with_an_invalid_file_loses_no_connection() -> Iterator[str]:
    """`restart` of the control protocol is refused and the daemon goes on; systemctl restart fails, with the reason in
    the journal, and a transfer pauses until the file is corrected.
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
def a_start_with_an_invalid_file_is_tried_once() -> Iterator[str]:
    """No connections wait for it, so the unit has failed, with the reason in the journal."""
    RELAY.do("stop")
    with changed(CONFIG, BASELINE[0] + "[contrl]\n"):
        RELAY.do("start", status=1)
        expect((RELAY.ActiveState, RELAY.ExecMainStatus, RELAY.NRestarts), ("failed", "78", "0"), "the unit")
        yield RELAY.must_say("contrl")
        no_tracebacks([RELAY])
    RELAY.do("start")
