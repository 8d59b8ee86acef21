"""Host names of tunnels: which credential may have which, and how a request finds its tunnel. Pure.

    blog                     a label: under the relay's domain, blog.t.example.org
    blog.t.example.org       the same, in full
    shop.example.com         a name of the user's own, see `check_name`

How names are written is `net.address`'s.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

from tunneld.errors import LimitReachedError, NotAllowedError, UsageError
from tunneld.net.address import HostName, parse_host_name

RESERVED_LABELS = frozenset(
    {
        *("www", "admin", "administrator", "root", "api", "mail", "smtp", "imap", "pop", "ns", "ns1", "ns2", "mx"),
        *("ftp", "ssh", "vpn", "login", "auth", "account", "accounts", "status", "support", "help", "security"),
        *(
            "postmaster",
            "hostmaster",
            "webmaster",
            "abuse",
            "localhost",
            "autoconfig",
            "autodiscover",
            "wpad",
            "isatap",
        ),
    }
)
"""Labels under the relay's domain that need an explicit grant: people would take them for the operator's, and some are
looked up by programs (wpad, autoconfig), or prove who owns a domain (postmaster).
"""


def complete_name(text: str, domain: str) -> HostName:
    """Parse a name as users write it: a label alone, or `*`, is completed by `domain`, the relay's.

    Raises `UsageError`.
    """
    host, slash, path = text.partition("/")
    if domain and host and "." not in host:
        text = f"{host}.{domain}{slash}{path}"
    name = parse_host_name(text)
    if "." not in name.name.removeprefix("*."):
        raise UsageError(f"invalid host name {text!r}: this relay has no domain to complete it (names.domain)")
    return name


def check_name(name: HostName, domain: str, patterns: Sequence[str] | None, credential: str) -> None:
    """Raise `NotAllowedError` where a credential may not have `name`.

    `patterns` are the ones of the credential, such as `alice-*`, `blog` or `shop.example.com`; a pattern without a dot
    is under the relay's `domain`. None: any label under it that is not reserved. A name of another domain needs a
    pattern of its own, a wildcard exactly that: the operator vouches for them.
    """
    under = name.name.endswith("." + domain) if domain else False
    label = name.name.removesuffix("." + domain) if under else ""
    if patterns is None:
        if (
            under
            and "." not in label
            and label != "*"
            and label not in RESERVED_LABELS
            and not label.startswith("xn--")
        ):
            return
        what = "reserved" if under and label in RESERVED_LABELS else "not a single label under the domain of the relay"
        raise NotAllowedError(
            f"{credential} may not use the host name {name.name}: it is {what}; ask the operator (names)"
        )
    for pattern in patterns:
        full = pattern if "." in pattern else f"{pattern}.{domain}"
        if name.name == pattern if name.name.startswith("*.") else _matches(name.name, full):
            return
    raise NotAllowedError(f"{credential} may not use the host name {name.name}, only {', '.join(patterns)} (names)")


# Custom domains

PROOF_LABEL = "_tunneld"
"""In front of a name in the DNS: the record with the proof of who may use it."""
PROOF_START = "tunneld-domain="


def is_custom(name: HostName, domain: str) -> bool:
    """Whether a name is of a domain of the user's own: neither the relay's `domain` nor below it."""
    return not f".{name.name.removeprefix('*.')}".endswith(f".{domain}")


def proof_record(name: HostName) -> str:
    """Where the DNS has the proof for a name, as a user enters it; a wildcard's is that of its domain."""
    return f"{PROOF_LABEL}.{name.name.removeprefix('*.')}"


def proof_text(domain: str, credential: str) -> str:
    """The TXT record that lets a credential of the relay with this `domain` use a name.

    It is no secret: it proves that the owner of the name agrees, since only the owner can set it. It does not tell the
    credential's name to everybody, and a record for one relay is none for another.
    """
    digest = hashlib.sha256(f"{PROOF_START}\0{domain}\0{credential}".encode()).digest()
    return PROOF_START + base64.b32encode(digest[:20]).decode().lower()


def _matches(host: str, pattern: str) -> bool:
    """Whether a host name has the form of a pattern, in which `*` stands for no dot: `alice-*` is one label."""
    return host.count(".") == pattern.count(".") and fnmatchcase(host, pattern)


Site = TypeVar("Site")


class SiteTable(Generic[Site]):
    """Finds the site of a request by host and path, in a time that does not depend on how many there are."""

    def __init__(self, max_sites: Callable[[], int]) -> None:
        """`max_sites` bounds the memory; the configuration has it with its reason."""
        self._max_sites = max_sites
        self._hosts: dict[str, dict[str, Site]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: HostName) -> bool:
        return name.path in self._hosts.get(name.name, ())

    def __iter__(self) -> Iterator[tuple[HostName, Site]]:
        for host, paths in self._hosts.items():
            for path, site in paths.items():
                yield HostName(host, path), site

    def add(self, name: HostName, site: Site) -> None:
        """Let requests to `name` find `site`. Raises `LimitReachedError` where it is taken or the table is full."""
        if name in self:
            raise LimitReachedError(f"host name {name} is in use by another tunnel")
        if self._count >= self._max_sites():
            raise LimitReachedError(f"limit of host names reached: the relay has {self._count} (names.max_names)")
        self._hosts.setdefault(name.name, {})[name.path] = site
        self._count += 1

    def get(self, name: HostName) -> Site | None:
        """The site with exactly this name."""
        return self._hosts.get(name.name, {}).get(name.path)

    def replace(self, name: HostName, site: Site) -> None:
        """Let requests to `name`, which is in the table, find another site."""
        self._hosts[name.name][name.path] = site

    def remove(self, name: HostName, site: Site) -> None:
        """Undo `add`. Does nothing where another site has the name now."""
        paths = self._hosts.get(name.name, {})
        if paths.get(name.path) is site:
            del paths[name.path]
            self._count -= 1
            if not paths:
                del self._hosts[name.name]

    def has_host(self, host: str) -> bool:
        """Whether a site has exactly this host name, whatever its path."""
        return host in self._hosts

    def only(self, host: str) -> Site | None:
        """The site of all requests for this host name; None where `find` has to tell."""
        paths = self._hosts.get(host)
        return paths.get("") if paths is not None and len(paths) == 1 else None

    def find(self, host: str, path: str = "") -> Site | None:
        """The site for a request: of the host name itself, else of the wildcard one label above; in each the longest
        path that the request's path is below.
        """
        for name in (host, self._wildcard(host)):
            paths = self._hosts.get(name)
            if paths is not None and (site := self._longest(paths, path)) is not None:
                return site
        return None

    @staticmethod
    def _wildcard(host: str) -> str:
        return "*." + host.partition(".")[2]

    @staticmethod
    def _longest(paths: dict[str, Site], path: str) -> Site | None:
        if len(paths) == 1 and "" in paths:  # nearly always
            return paths[""]
        path = path.rstrip("/")
        while path:
            if (site := paths.get(path)) is not None:
                return site
            path = path.rpartition("/")[0]
        return paths.get("")
