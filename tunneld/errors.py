"""Every exception raised on purpose.

Each class answers two questions: whose fault is it, and what dies of it. The wire code is what the control protocol
says after `ERR` (and the fault or problem of the HTTP face), the exit status is what `tunnel` and `tunneld` leave
with (sysexits(3)).

    class                  whose fault           what dies                wire code         exit status
    UsageError             who typed it          nothing                  usage             64 EX_USAGE
    NoSuchTunnelError      who asked             nothing                  no-such-tunnel    69 EX_UNAVAILABLE
    EndedError             who closed it         the tunnel               ended             77 EX_NOPERM
    NotAllowedError        who asked             nothing                  not-allowed       77 EX_NOPERM
    LimitReachedError      load                  the request              limit             75 EX_TEMPFAIL
    ShortageError          this machine          the request              shortage          71 EX_OSERR
    DrainingError          the operator          the request              draining          75 EX_TEMPFAIL
    ConfigError            who wrote the file    the start or the reload  config            78 EX_CONFIG
    AwaitedConfigError     who wrote the file    this try to start        (only logged)     69 EX_UNAVAILABLE
    ListenError            this machine          the listener             cannot-listen     71 EX_OSERR
    StoreError             this machine          nothing                  (only logged)
    RemoteProtocolError    the peer              its connection           protocol          76 EX_PROTOCOL
    LocalProtocolError     us (a bug)            its connection           internal          70 EX_SOFTWARE
    RelayUnreachableError  the network           the command              unreachable       69 EX_UNAVAILABLE
    RefusedError           as its code says      the request              (the relay's)     by code

Messages are lower case, name the object with its kind and end in a reason:
`could not listen on tcp://0.0.0.0:8010: address already in use`.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar


class TunneldError(Exception):
    """The root: a message for a person, a wire code for programs, an exit status for shells."""

    code: ClassVar[str] = "internal"
    exit_status: ClassVar[int] = os.EX_SOFTWARE


class UsageError(TunneldError):
    """A request that cannot be understood or asks for what does not exist; the asker can mend it."""

    code = "usage"
    exit_status = os.EX_USAGE


class NoSuchTunnelError(TunneldError):
    """The URI or id names no open tunnel (any more)."""

    code = "no-such-tunnel"
    exit_status = os.EX_UNAVAILABLE


class EndedError(TunneldError):
    """The URI names a tunnel that somebody closed or drained on purpose: it is not to be opened again unasked."""

    code = "ended"
    exit_status = os.EX_NOPERM


class NotAllowedError(TunneldError):
    """Understood, but not for this asker."""

    code = "not-allowed"
    exit_status = os.EX_NOPERM


class LimitReachedError(TunneldError):
    """A configured limit stands in the way now; later may be different."""

    code = "limit"
    exit_status = os.EX_TEMPFAIL


class ShortageError(TunneldError):
    """The machine ran out of something: descriptors, ports, memory for sockets."""

    code = "shortage"
    exit_status = os.EX_OSERR


SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What `socket` and `accept` fail with when the process or the machine has no more of something; trying again at once
would spin.
"""


class DrainingError(TunneldError):
    """The daemon takes nothing new because it is being drained."""

    code = "draining"
    exit_status = os.EX_TEMPFAIL


class ConfigError(TunneldError):
    """A configuration file that cannot be used.

    `problems` holds one sentence for each mistake, each with file, key path and reason.
    """

    code = "config"
    exit_status = os.EX_CONFIG

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class AwaitedConfigError(ConfigError):
    """The same, while systemd keeps connections for whoever starts next: it tries again, and a file that was mended
    by then loses nobody.
    """

    exit_status = os.EX_UNAVAILABLE

    def __init__(self, problems: list[str]) -> None:
        super().__init__(
            [*problems, "connections of the process before are kept until this is mended, or until a stop"]
        )


class ListenError(TunneldError):
    """A listening socket could not be made."""

    code = "cannot-listen"
    exit_status = os.EX_OSERR


class StoreError(TunneldError):
    """What should survive the process cannot be kept or read."""


class RemoteProtocolError(TunneldError):
    """The peer broke the protocol: its connection ends, nothing else does."""

    code = "protocol"
    exit_status = os.EX_PROTOCOL


class LocalProtocolError(TunneldError):
    """We were about to break the protocol: a bug of ours."""

    code = "internal"
    exit_status = os.EX_SOFTWARE


class RelayUnreachableError(TunneldError):
    """No control connection to the relay: it cannot be reached, does not answer, or went away."""

    code = "unreachable"
    exit_status = os.EX_UNAVAILABLE


class RefusedError(TunneldError):
    """The relay understood and said no. `reply_code` is the wire code it gave, so callers can tell the reasons
    apart.
    """

    code = "refused"

    def __init__(self, reply_code: str, message: str) -> None:
        super().__init__(message)
        self.reply_code = reply_code

    @property
    def status(self) -> int:
        """The exit status that belongs to the relay's wire code."""
        return EXIT_STATUSES.get(self.reply_code, os.EX_SOFTWARE)


EXIT_STATUSES: dict[str, int] = {
    kind.code: kind.exit_status
    for kind in (
        UsageError,
        NoSuchTunnelError,
        EndedError,
        NotAllowedError,
        LimitReachedError,
        ShortageError,
        DrainingError,
        ConfigError,
        ListenError,
        RemoteProtocolError,
        TunneldError,
    )
}


def reason_of(error: OSError) -> str:
    """The reason inside an `OSError`, in lower case and without its number: `address already in use`."""
    text = error.strerror or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]
