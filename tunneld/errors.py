"""Every exception that the program raises on purpose.

Each class answers two questions: what is at fault, and what ends because of it. The wire code follows `ERR` in the
control protocol (and is the fault or problem over HTTP); the exit status is that of `tunnel` and `tunneld`
(sysexits(3)).

    class                  at fault              what ends                wire code         exit status
    UsageError             the request           nothing                  usage             64 EX_USAGE
    NoSuchTunnelError      the request           nothing                  no-such-tunnel    69 EX_UNAVAILABLE
    EndedError             the owner, operator   the tunnel               ended             77 EX_NOPERM
    ExpiredError           the tunnel's limits   the tunnel               expired           79
    NotAllowedError        the requester         nothing                  not-allowed       77 EX_NOPERM
    LimitReachedError      load                  the request              limit             75 EX_TEMPFAIL
    ShortageError          this machine          the request              shortage          71 EX_OSERR
    DrainingError          the operator          the request              draining          75 EX_TEMPFAIL
    ConfigError            the file              the start or the reload  config            78 EX_CONFIG
    AwaitedConfigError     the file              this attempt to start    (only logged)     69 EX_UNAVAILABLE
    ListenError            this machine          the listener             cannot-listen     71 EX_OSERR
    CertificateError       DNS, the authority    the order                no-certificate    75 EX_TEMPFAIL
    StoreError             this machine          nothing                  (only logged)
    RemoteProtocolError    the peer              its connection           protocol          76 EX_PROTOCOL
    LocalProtocolError     this program (a bug)  its connection           internal          70 EX_SOFTWARE
    RelayUnreachableError  the network           the command              unreachable       69 EX_UNAVAILABLE
    RefusedError           see the wire code     the request              (the relay's)     by code

Messages are in lower case, name the object with its kind and end with a reason:
`could not listen on tcp://0.0.0.0:8010: address already in use`.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar


class TunneldError(Exception):
    """The base class: a message for people, a wire code for programs, an exit status for shells."""

    code: ClassVar[str] = "internal"
    exit_status: ClassVar[int] = os.EX_SOFTWARE


class UsageError(TunneldError):
    """A request that cannot be understood, or that asks for what does not exist; the requester can correct it."""

    code = "usage"
    exit_status = os.EX_USAGE


class NoSuchTunnelError(TunneldError):
    """The URI or id names no open tunnel, or no longer one."""

    code = "no-such-tunnel"
    exit_status = os.EX_UNAVAILABLE


class EndedError(TunneldError):
    """The tunnel was closed or drained on purpose; an agent must not open it again by itself."""

    code = "ended"
    exit_status = os.EX_NOPERM


EX_EXPIRED = 79
"""The exit status after the end of a tunnel that used up its quota or lived as long as it may; sysexits(3) has none."""


class ExpiredError(TunneldError):
    """The tunnel has ended by one of its limits (`ttl`, `idle_timeout`, `quota`), whose name ends the message; an agent
    must not open it again by itself.
    """

    code = "expired"
    exit_status = EX_EXPIRED


class NotAllowedError(TunneldError):
    """The requester may not do this."""

    code = "not-allowed"
    exit_status = os.EX_NOPERM


class LimitReachedError(TunneldError):
    """A configured limit is reached; the request may succeed later."""

    code = "limit"
    exit_status = os.EX_TEMPFAIL


class ShortageError(TunneldError):
    """The machine ran out of descriptors, ports or socket memory."""

    code = "shortage"
    exit_status = os.EX_OSERR


SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of `socket` and `accept` when descriptors or socket memory are used up; an immediate retry would spin."""

DIAL_SHORTAGES = SHORTAGES | {errno.EADDRNOTAVAIL}
"""The same of `socket` and `connect`: local ports can be used up as well."""


class DrainingError(TunneldError):
    """The daemon is draining and accepts nothing new."""

    code = "draining"
    exit_status = os.EX_TEMPFAIL


class ConfigError(TunneldError):
    """A configuration file that cannot be used.

    `problems` holds one sentence per mistake, with file, key path and reason.
    """

    code = "config"
    exit_status = os.EX_CONFIG

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class AwaitedConfigError(ConfigError):
    """The same while systemd holds the connections of the previous process. systemd starts the daemon again; once
    the file is corrected, no connection is lost.
    """

    exit_status = os.EX_UNAVAILABLE

    def __init__(self, problems: list[str]) -> None:
        kept = "connections of the previous process are kept until this is corrected or the service is stopped"
        super().__init__([*problems, kept])


class ListenError(TunneldError):
    """A listening socket could not be opened."""

    code = "cannot-listen"
    exit_status = os.EX_OSERR


class CertificateError(TunneldError):
    """An authority gave no certificate. The message names the reason that it gave; the order may succeed later."""

    code = "no-certificate"
    exit_status = os.EX_TEMPFAIL


class StoreError(TunneldError):
    """Persistent data could not be written or read."""


class RemoteProtocolError(TunneldError):
    """The peer violated the protocol; only its connection ends."""

    code = "protocol"
    exit_status = os.EX_PROTOCOL


class LocalProtocolError(TunneldError):
    """A bug: this program was about to violate the protocol."""

    code = "internal"
    exit_status = os.EX_SOFTWARE


class RelayUnreachableError(TunneldError):
    """There is no control connection: the relay cannot be reached, does not answer, or closed it."""

    code = "unreachable"
    exit_status = os.EX_UNAVAILABLE


class RefusedError(TunneldError):
    """The relay refused a request; `reply_code` is the wire code of the reason."""

    code = "refused"

    def __init__(self, reply_code: str, message: str) -> None:
        super().__init__(message)
        self.reply_code = reply_code

    @property
    def status(self) -> int:
        """The exit status for the relay's wire code."""
        return EXIT_STATUSES.get(self.reply_code, os.EX_SOFTWARE)


EXIT_STATUSES: dict[str, int] = {
    kind.code: kind.exit_status
    for kind in (
        UsageError,
        NoSuchTunnelError,
        EndedError,
        ExpiredError,
        NotAllowedError,
        LimitReachedError,
        ShortageError,
        DrainingError,
        ConfigError,
        ListenError,
        CertificateError,
        RemoteProtocolError,
        TunneldError,
    )
}


def reason_of(error: OSError) -> str:
    """Return the reason of an `OSError` in lower case, without its number: `address already in use`."""
    text = error.strerror or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]
