"""From root to a user without rights, once every port is bound: `daemon.user` and `daemon.group`.

What stays is at most one capability, to bind ports below 1024, and only where `tunnels.ports` has such: tunnels open
theirs later. It stays over execve, too (ambient), for a restart. Nothing that is started from here on can gain rights
(no_new_privs).

Whoever starts as a user already, as the systemd unit does, has nothing to give up.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunneld.config.schema import Settings
from tunneld.config.values import parse_port_range
from tunneld.errors import ConfigError, reason_of

LOW = 1024
"""Ports below it are for those with CAP_NET_BIND_SERVICE, by default (net.ipv4.ip_unprivileged_port_start)."""

NET_BIND_SERVICE = 10
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 8, 38, 47, 2
CAPABILITY_VERSION_3 = 0x20080522  # of capset(2): 64 bits in two halves


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the daemon is to be, as numbers; `name` is for the groups that the user has besides."""

    name: str
    uid: int
    gid: int
    home: str


def identity(settings: Settings) -> Identity | None:
    """Whom the configuration names; None: nobody. Raises `ConfigError` where there is no such user or group, or where
    this process can become nobody else.
    """
    wanted = settings.daemon
    if not wanted.user:
        return None
    try:
        user = pwd.getpwuid(int(wanted.user)) if wanted.user.isdigit() else pwd.getpwnam(wanted.user)
    except KeyError:
        raise ConfigError([f"daemon.user: there is no user {wanted.user!r}; useradd --system makes one"]) from None
    try:
        gid = _group(wanted.group) if wanted.group else user.pw_gid
    except KeyError:
        raise ConfigError([f"daemon.group: there is no group {wanted.group!r}"]) from None
    if os.geteuid() not in {0, user.pw_uid}:
        hint = "start it as root, or leave that key out"
        raise ConfigError([f"daemon.user: user {os.geteuid()} cannot become {wanted.user!r}: {hint}"])
    return Identity(user.pw_name, user.pw_uid, gid, user.pw_dir)


def become(who: Identity, state: Path | None, *, low_ports: bool) -> None:
    """Give root's rights up for good, if we have them. `state`: a folder that is to be this user's, made if it is not
    there.

    Raises `ConfigError` where the system does not let us.
    """
    if os.geteuid() != 0 or who.uid == 0:
        return
    try:
        if state is not None and not state.exists():
            state.mkdir(mode=0o700, parents=True)
            os.chown(state, who.uid, who.gid)
        keeps = low_ports and sys.platform == "linux"
        if keeps:
            _prctl(PR_SET_KEEPCAPS, 1)
        os.initgroups(who.name, who.gid)  # the user's own, and none of root's
        os.setresgid(who.gid, who.gid, who.gid)
        os.setresuid(who.uid, who.uid, who.uid)
        if keeps:
            _keep_only(NET_BIND_SERVICE)
            _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, NET_BIND_SERVICE)
        if sys.platform == "linux":
            _prctl(PR_SET_NO_NEW_PRIVS, 1)
    except OSError as error:
        raise ConfigError([f"daemon.user: could not become {who.name!r}: {reason_of(error)}"]) from None
    os.environ["HOME"] = who.home


def wants_low_ports(settings: Settings) -> bool:
    """Whether tunnels may be told to listen below 1024, later."""
    ports = parse_port_range(settings.tunnels.ports)
    return 0 < ports[0] < LOW


def unreadable(settings: Settings, config: Path | None) -> Iterator[tuple[str, Path, str]]:
    """What a reload would read and this user cannot: the key that names it, the file, the reason."""
    for key, path in _files(settings, config):
        try:
            path.open("rb").close()
        except OSError as error:
            yield key, path, reason_of(error)


def _files(settings: Settings, config: Path | None) -> Iterator[tuple[str, Path]]:
    if config is not None:
        yield "--config", config
    for table, tls in (("control.tls", settings.control.tls), ("http.tls", settings.http.tls)):
        for name in ("certificate", "key", "client_ca"):
            if (path := getattr(tls, name, None)) is not None:
                yield f"{table}.{name}", path
    for credential in settings.credential:
        if credential.secret_file is not None:
            yield f"credential.{credential.name}.secret_file", credential.secret_file


def _group(name: str) -> int:
    return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid


def _prctl(option: int, *arguments: int) -> None:
    _check(_libc().prctl(option, *(ctypes.c_ulong(number) for number in (*arguments, 0, 0, 0, 0)[:4])))


def _keep_only(capability: int) -> None:
    """Permitted, effective and inheritable: this one alone (capset(2))."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    mask = 1 << capability
    _check(_libc().capset(header, (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def tell_environment(config: Path | None, state: Path | None) -> None:
    """Let the program that we may become find what root found: it looks as another user."""
    for name, path in (("TUNNELD_CONFIG", config), ("STATE_DIRECTORY", state)):
        if path is not None:
            os.environ[name] = str(path.absolute())
