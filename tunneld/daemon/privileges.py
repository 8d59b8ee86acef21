"""Dropping root privileges once all ports are bound: `daemon.user` and `daemon.group`.

At most one capability is kept, to bind ports below 1024, and only if `tunnels.ports` has such ports, since tunnels bind
them later. It is ambient, so that it survives execve in a restart. No program started from here on can gain privileges
(no_new_privs).

A daemon started as an unprivileged user, as by the systemd unit, has nothing to drop.
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

from tunneld.config.permissions import config_files
from tunneld.config.schema import Settings
from tunneld.config.values import parse_port_range
from tunneld.errors import ConfigError, reason_of

FIRST_UNPRIVILEGED_PORT = 1024
"""Ports below need CAP_NET_BIND_SERVICE, unless net.ipv4.ip_unprivileged_port_start is changed."""

NET_BIND_SERVICE = 10
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 8, 38, 47, 2
CAPABILITY_VERSION_3 = 0x20080522  # of capset(2): 64 bits in two halves


@dataclass(frozen=True, slots=True)
class Account:
    """The user and group to change to; `name` is needed for the user's supplementary groups."""

    name: str
    uid: int
    gid: int
    home: str


def identity(settings: Settings) -> Account | None:
    """Look up the user and group in the configuration; None if no user is set.

    Raises `ConfigError` if there is no such user or group, or if this process may not change to it.
    """
    wanted = settings.daemon
    if not wanted.user:
        return None
    try:
        user = pwd.getpwuid(int(wanted.user)) if wanted.user.isdigit() else pwd.getpwnam(wanted.user)
    except KeyError:
        raise ConfigError([f"daemon.user: no user {wanted.user!r}; create it with useradd --system"]) from None
    try:
        gid = _group(wanted.group) if wanted.group else user.pw_gid
    except KeyError:
        raise ConfigError([f"daemon.group: no group {wanted.group!r}; create it with groupadd --system"]) from None
    if os.geteuid() not in {0, user.pw_uid}:
        hint = "start the daemon as root, or remove this key"
        raise ConfigError([f"daemon.user: user {os.geteuid()} cannot change to user {wanted.user!r}: {hint}"])
    return Account(user.pw_name, user.pw_uid, gid, user.pw_dir)


def become(user: Account, state: Path | None, *, low_ports: bool) -> None:
    """Change to `user` for good if this process runs as root; otherwise do nothing.

    Args:
        user: from `identity`.
        state: a folder that is made for the user if it does not exist.
        low_ports: whether to keep the capability to bind ports below 1024 (Linux only).

    Raises `ConfigError` if the system refuses.
    """
    if os.geteuid() != 0 or user.uid == 0:
        return
    try:
        if state is not None and not state.exists():
            state.mkdir(mode=0o700, parents=True)
            os.chown(state, user.uid, user.gid)
        keeps = low_ports and sys.platform == "linux"
        if keeps:
            _prctl(PR_SET_KEEPCAPS, 1)
        os.initgroups(user.name, user.gid)  # replaces root's supplementary groups
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        if keeps:
            _keep_only(NET_BIND_SERVICE)
            _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, NET_BIND_SERVICE)
        if sys.platform == "linux":
            _prctl(PR_SET_NO_NEW_PRIVS, 1)
    except OSError as error:
        raise ConfigError([f"daemon.user: could not change to user {user.name!r}: {reason_of(error)}"]) from None
    os.environ["HOME"] = user.home


def wants_low_ports(settings: Settings) -> bool:
    """Whether tunnels may have ports below 1024."""
    ports = parse_port_range(settings.tunnels.ports)
    return 0 < ports[0] < FIRST_UNPRIVILEGED_PORT


def unreadable(settings: Settings, config: Path | None) -> Iterator[tuple[str, Path, str]]:
    """Yield the files that a reload would read and this user cannot: the key that names each, its path, the reason."""
    for key, path in config_files(settings, config):
        try:
            path.open("rb").close()
        except OSError as error:
            yield key, path, reason_of(error)


def _group(name: str) -> int:
    return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid


def _prctl(option: int, *arguments: int) -> None:
    _check(_libc().prctl(option, *(ctypes.c_ulong(number) for number in (*arguments, 0, 0, 0, 0)[:4])))


def _keep_only(capability: int) -> None:
    """Make this the only permitted, effective and inheritable capability (capset(2))."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    mask = 1 << capability
    _check(_libc().capset(header, (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def export_paths(config: Path | None, state: Path | None) -> None:
    """Set both paths in the environment, for the program of a restart: as this user, it would search other folders."""
    for name, path in (("TUNNELD_CONFIG", config), ("STATE_DIRECTORY", state)):
        if path is not None:
            os.environ[name] = str(path.absolute())
