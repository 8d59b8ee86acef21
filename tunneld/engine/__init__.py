"""The data plane: it relays bytes between two ends. `new_engine` makes the engine for this system.

    visitor's end ──► flow ──► server's end         a relay is two ends and two flows
    visitor's end ◄── flow ◄── server's end

The contract towards owners
    engine          `Engine.join(a, b)`, `Relay`, `Limiter` and how a relay ends; both engines keep it
    limits          sizes and times, each with its reason
    handover        the state of a relay that moves to another engine or process
    failures        reports bugs, shortages and resets

Relays, the same in both engines
    relay           how a relay ends: half-close, failed writes, linger, resets. Once, for all kinds of ends
    flow            one direction; it only moves bytes
    flows           the table: which flow for which kinds of ends
    socket_flow     between two sockets: `recv`/`send`, or `splice` through borrowed `pipes`
    end_flow        from any other end
    socket_to_end   from a socket to any other end
    throttle        bandwidth and quota
    vanished        peers that do not answer any more

Ends, the sides of a relay
    end             the contract: `End`, `BufferedEnd` and its `EndHandler`
    socket_end      a plain socket
    tls_end         a TLS connection; with a `plain_transport`, a socket whose bytes are looked at (`tapped`: by a tap)
    stream_end      any Trio stream
    (mux.channel)   a channel of a carrier
    end_stream      the reverse: an end as a Trio stream

Engines
    scheduler       what ends, relays and carriers ask of their engine: time, deadlines, callbacks, tasks
    timers          deadlines
    budget          how much of a turn of the pump each owner may take
    pump            Linux: one Trio task over one epoll set; `events` has what epoll reports
    acceptor        the pump's listeners and parked connections; descriptors that visitors do not get
    portable        any other system: Trio tasks; every socket is a `StreamEnd`

To add a kind of end (a remote node, an encrypted private stream, a flow of datagrams), subclass `BufferedEnd`: feed it
what arrives and implement `send_capacity`, `write`, `finish`, `reset` and `_consumed`. It can then be joined to every
other kind, by `EndToEnd`, and tests/engine/test_ends.py tells whether it keeps the contract. A datagram end feeds and
writes records with a length in front. A flow of its own, in the table of `flows`, is only worth while where bytes can
take a shorter way.
"""

from __future__ import annotations

import sys
from typing import Any

from tunneld.engine.engine import Engine
from tunneld.engine.limits import EngineLimits


def new_engine(**limits: Any) -> Engine:
    """Return the best engine for this system; `limits` are fields of `EngineLimits`. It serves while `run` runs."""
    if sys.platform == "linux":  # pump.py cannot even be imported without epoll and splice
        from tunneld.engine.pump import Pump as NativeEngine  # noqa: PLC0415
    else:
        from tunneld.engine.portable import PortableEngine as NativeEngine  # noqa: PLC0415
    return NativeEngine(EngineLimits(**limits))
