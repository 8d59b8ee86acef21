"""`tunneld certificate`: list, try and renew the certificates for host names, see CERTIFICATES in tunneld(8).

The running relay does it, if there is one: its ports answer the challenges. Otherwise this process does it itself, with
the same settings, ports and files.
"""

from __future__ import annotations

import argparse
import os
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import trio

from tunneld.acme.plans import CertificatePlans
from tunneld.acme.report import describe
from tunneld.acme.state import account_folder, certificate_folder
from tunneld.cli.access import credential, form
from tunneld.cli.common import complain, say
from tunneld.cli.credential import local_relay
from tunneld.cli.tables import CERTIFICATES, Form, Record, json_lines, table
from tunneld.client import Client
from tunneld.config import LogSettings, Settings, find_config, load
from tunneld.config.places import state_folder
from tunneld.daemon import log
from tunneld.daemon.privileges import identity
from tunneld.errors import CertificateError, NotAllowedError, RelayUnreachableError, UsageError
from tunneld.net.address import parse_host_name
from tunneld.tls.store import CertificateStore

if TYPE_CHECKING:
    from tunneld.acme.orders import Orders

MARGIN = 30.0
"Seconds in addition to `acme.order_timeout` for the relay to answer: other orders may run first."


def run(options: argparse.Namespace) -> int:
    """Carry out one of the commands. Returns the exit status."""
    if options.check or options.print_config or options.log_format or options.log_level:
        raise UsageError("options before `certificate` apply to running the daemon; only --config has a meaning here")
    path: Path | None = options.config or find_config()
    settings = load(path) if path is not None else Settings()
    log.configure(LogSettings(format="human", level="warning"))  # the steps are shown instead
    actions = {"list": list_certificates, "try": try_certificate, "renew": renew}
    return trio.run(actions[options.action], options, settings)


async def list_certificates(options: argparse.Namespace, settings: Settings) -> int:
    """Print a table of certificates: of the running relay, or from the files, for which no credential is needed."""

    async def ask(client: Client) -> Sequence[Record]:
        return (await client.call("certificates")).items

    try:
        records = await _with_relay(options, settings, ask)
    except RelayUnreachableError:
        records = _from_files(settings)
    except NotAllowedError:
        if options.credential is not None:
            raise
        complain("tunneld: from the files; a credential with the role admin also shows which names are in use")
        records = _from_files(settings)
    shape = form(options)
    if shape is Form.JSON:
        say(json_lines(records), end="")
    elif records or shape is Form.FIELDS:
        say(table(records, CERTIFICATES, shape), end="")
    else:
        say("no certificates for host names")
    return os.EX_OK


async def try_certificate(options: argparse.Namespace, settings: Settings) -> int:
    """Order a certificate that is thrown away, and print each step."""
    name = _name(options)

    async def ask(client: Client) -> bool:
        complain(f"tunneld: the relay orders a certificate for {name} and throws it away; this takes some seconds ...")
        steps = (await client.call("tryCertificate", name)).items
        for step in steps:
            _show(step["step"], failed=step["failed"] == "yes")
        return bool(steps) and steps[-1]["failed"] != "yes"

    try:
        is_good = await _with_relay(options, settings, ask)
    except RelayUnreachableError as error:
        complain(f"tunneld: {error}; ordering without it")
        is_good = await trio.to_thread.run_sync(_try_directly, settings, name)
    return os.EX_OK if is_good else CertificateError.exit_status


async def renew(options: argparse.Namespace, settings: Settings) -> int:
    """Order a new certificate now."""
    name = _name(options)

    async def ask(client: Client) -> str:
        complain(f"tunneld: the relay orders a certificate for {name}; this takes some seconds ...")
        return (await client.call("renew", name)).text

    try:
        say(await _with_relay(options, settings, ask))
    except RelayUnreachableError as error:
        complain(f"tunneld: {error}; ordering without it")
        await trio.to_thread.run_sync(_renew_directly, settings, name)
        say(f"renewed the certificate for {name}")
    return os.EX_OK


# Through the relay

Result = TypeVar("Result")


async def _with_relay(
    options: argparse.Namespace, settings: Settings, ask: Callable[[Client], Awaitable[Result]]
) -> Result:
    """Ask the relay that runs with these settings. Raises `RelayUnreachableError` if there is none, and
    `NotAllowedError` if it needs another credential.
    """
    try:
        async with local_relay(settings, credential(options)).connect() as client:
            client.timeout = settings.acme.order_timeout + MARGIN
            return await ask(client)
    except NotAllowedError as error:
        if options.credential is not None:
            raise
        raise NotAllowedError(
            f"{error}; its role must be admin (tunnel credential add operator --role admin > operator.secret)"
        ) from None


# Without it


def _state(settings: Settings) -> Path:
    """The state folder. As root, this process becomes its owner: its files must be the daemon's."""
    state = settings.daemon.state or state_folder()
    if state is None:
        raise UsageError("no folder for certificates; set daemon.state")
    user = identity(settings)
    if user is not None and os.geteuid() == 0 and not state.exists():
        state.mkdir(mode=0o700, parents=True)
        os.chown(state, user.uid, user.gid)
    with suppress(FileNotFoundError):
        owner = state.stat()
        if os.geteuid() == 0 and owner.st_uid != 0:
            os.setegid(owner.st_gid)
            os.seteuid(owner.st_uid)
    return state


def _from_files(settings: Settings) -> Sequence[Record]:
    """What can be told of the certificates without the relay: not which names are in use."""
    state = _state(settings)
    store = CertificateStore(certificate_folder(state))
    store.apply(store.load({}, settings.named_certificates))
    plans = CertificatePlans(store, lambda: settings.acme, time.time)
    plans.failures.load(account_folder(state, settings.acme.directory))
    for each in store.stored():
        plans.want(each.names[0], "")
    for name in plans.failures.names():
        plans.want(name, "")
    items = describe(store, plans, time.time())
    return [{key: str(value) for key, value in item.items() if value is not None} for item in items]


@contextmanager
def _orders(settings: Settings) -> Iterator[Orders]:
    """Orders whose challenges are answered by the ports of the relay, which this process binds."""
    from tunneld.acme.orders import Orders  # noqa: PLC0415 - its libraries are an extra
    from tunneld.acme.standalone import challenge_ports  # noqa: PLC0415

    if not settings.acme.agree:
        raise UsageError("no certificate can be ordered; set acme.enabled and acme.agree in the configuration")
    answers: dict[str, bytes] = {}
    contexts: dict[str, ssl.SSLContext] = {}
    names = settings.names
    with challenge_ports(names.http_address, names.https_address, answers, contexts):
        yield Orders(settings.acme, _state(settings), answers, contexts, names.challenges)


def _try_directly(settings: Settings, name: str) -> bool:
    with _orders(settings) as orders:
        try:
            orders.trial(name, _show)
        except (CertificateError, UsageError) as error:
            _show(str(error), failed=True)
            return False
    return True


def _renew_directly(settings: Settings, name: str) -> None:
    with _orders(settings) as orders:
        issued = orders.obtain(name, 0)
        CertificateStore(certificate_folder(orders.state)).put(issued.chain, issued.key)


def _show(step: str, failed: bool = False) -> None:
    say(f"{'failed' if failed else 'ok':8} {step}")


def _name(options: argparse.Namespace) -> str:
    """The host name that was asked for, in lower case. Raises `UsageError`."""
    name = parse_host_name(options.name)
    if name.path or "." not in name.name:
        raise UsageError(f"{options.name!r} is no whole host name, such as blog.t.example.org")
    return name.name
