"""mesgen, the envelope of EGTP v1 (Mojo Nation, 2002): messages encrypted and signed for one node. Pure.

Do not rely on it. RSA has 1024 bits and the exponent 3; the cipher is DESX with blocks of 64 bits; SHA-1 is everywhere;
a message is authenticated before it is encrypted, by a construction of its own; both directions use one key. There are
no counters and no fresh keys: a recorded message can be sent again, and a stolen key opens all that was ever recorded.
Anybody on the way can end a session with a forged reject. It is here to talk with nodes of that time, is off unless the
operator turns it on, and nothing of ours prefers it.

    ciphers   R (the pseudo-random function), OAEP with it, DESX, the MAC, RSA without padding
    keys      private and public keys, and the ids of nodes
    header    the header that sets up a session: made, opened
    envelope  the three kinds of envelopes as bytes, and how messages are sealed
    sessions  all sessions of a node: which kind is sent, what is received

    sessions = MesgenSessions(key, os.urandom)
    peer = sessions.store_key(modulus)
    envelope = sessions.seal(peer, deflate(message))
    ...
    match sessions.open(envelope):
        case OpenedEnvelope(sender, packed): message = inflate(packed)

Random octets come from an argument. The one exception is `new_key`, which has OpenSSL make the primes.
"""

from tunneld.wire.egtp.mesgen.envelope import EnvelopeError
from tunneld.wire.egtp.mesgen.keys import ClassicKey, ClassicPublicKey, new_key
from tunneld.wire.egtp.mesgen.sessions import (
    MesgenSessions,
    OpenedEnvelope,
    RejectAnswer,
    SessionLost,
    UnknownKeyError,
)

__all__ = [
    "ClassicKey",
    "ClassicPublicKey",
    "EnvelopeError",
    "MesgenSessions",
    "OpenedEnvelope",
    "RejectAnswer",
    "SessionLost",
    "UnknownKeyError",
    "new_key",
]
