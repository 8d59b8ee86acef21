"""The certificate store: contexts by port and by server name, replaced while handshakes run, and never for worse."""

from __future__ import annotations

import os
import ssl
import stat
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from structlog.testing import capture_logs

import tunneld.tls.folder
from tunneld.config.certificates import TlsFiles
from tunneld.errors import ConfigError
from tunneld.tls.certificate import ServerCertificate
from tunneld.tls.contexts import unverified_tls_context
from tunneld.tls.folder import INDEX, CertificateFolder, StoredFile
from tunneld.tls.pins import fingerprint, first_fingerprint
from tunneld.tls.self_signed import LIFE, make_self_signed
from tunneld.tls.store import CertificateStore

CA = trustme.CA()


class Handshake:
    """A TLS handshake in memory, one flight at a time."""

    def __init__(
        self, server: ssl.SSLContext, client: ssl.SSLContext | None = None, server_name: str | None = None
    ) -> None:
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._server = server.wrap_bio(to_server, to_client, server_side=True)
        self._client = (client or unverified_tls_context()).wrap_bio(to_client, to_server, server_hostname=server_name)

    def begin(self) -> None:
        with suppress(ssl.SSLWantReadError):
            self._client.do_handshake()

    @property
    def protocol(self) -> str | None:
        """What both have agreed on by ALPN."""
        return self._client.selected_alpn_protocol()

    def finish(self) -> str:
        """Complete it, and return the fingerprint of the certificate that the server shows."""
        for step in (self._server.do_handshake, self._client.do_handshake, self._server.do_handshake):
            with suppress(ssl.SSLWantReadError):
                step()
        return fingerprint(self._client.getpeercert(binary_form=True) or b"")


def shown(context: ssl.SSLContext | None) -> str:
    assert context is not None
    handshake = Handshake(context)
    handshake.begin()
    return handshake.finish()


def issue(folder: Path, file: str, *names: str) -> TlsFiles:
    """A new certificate and its key in `FILE.pem` and `FILE.key`."""
    issued = CA.issue_cert(*names)
    issued.private_key_pem.write_to_path(folder / f"{file}.key")
    issued.cert_chain_pems[0].write_to_path(folder / f"{file}.pem")
    return TlsFiles(certificate=folder / f"{file}.pem", key=folder / f"{file}.key")


def pem(*names: str, days: int = 90) -> tuple[bytes, bytes]:
    """The chain and the key of a new certificate."""
    issued = CA.issue_cert(*names, not_after=datetime.now(UTC) + timedelta(days=days))
    return b"".join(each.bytes() for each in issued.cert_chain_pems), issued.private_key_pem.bytes()


def load(store: CertificateStore, **named: TlsFiles) -> None:
    store.apply(store.load({}, named))


def test_a_port_has_the_certificate_of_its_table(tmp_path: Path) -> None:
    store = CertificateStore()
    assert store.port("control.tls") is None
    one, two = issue(tmp_path, "one", "one.example.org"), issue(tmp_path, "two", "two.example.org")
    store.apply(store.load({"control.tls": one, "http.tls": two}))
    assert shown(store.port("control.tls")) == first_fingerprint(one.certificate)
    assert shown(store.port("http.tls")) == first_fingerprint(two.certificate)
    assert store.context_for("one.example.org") is None  # a port's own certificate is for no other port
    store.apply(store.load({"http.tls": two}))
    assert store.port("control.tls") is None


def test_the_exact_name_is_preferred_to_the_wildcard(tmp_path: Path) -> None:
    store = CertificateStore()
    wild, blog = issue(tmp_path, "wild", "*.t.example.org", "t.example.org"), issue(tmp_path, "b", "blog.t.example.org")
    load(store, wild=wild, blog=blog)
    for name in ("a.t.example.org", "A.T.Example.ORG", "a.t.example.org.", "t.example.org"):
        assert shown(store.context_for(name)) == first_fingerprint(wild.certificate), name
    assert shown(store.context_for("blog.t.example.org")) == first_fingerprint(blog.certificate)


def test_a_client_that_verifies_gets_the_certificate_for_the_name_that_it_asks_for(tmp_path: Path) -> None:
    store = CertificateStore()
    load(store, wild=issue(tmp_path, "wild", "*.t.example.org"), other=issue(tmp_path, "other", "other.example.org"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.sni_callback = lambda connection, name, _: setattr(connection, "context", store.context_for(name or ""))
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    CA.configure_trust(client)
    for name in ("blog.t.example.org", "other.example.org"):
        handshake = Handshake(server, client, name)
        handshake.begin()
        assert handshake.finish() == shown(store.context_for(name))


@pytest.mark.parametrize("name", ["", ".", "*", "*.t.example.org", "a.b.t.example.org", "example.org", "t", "a\0.t"])
def test_an_unknown_name_has_no_context(tmp_path: Path, name: str) -> None:
    store = CertificateStore()
    load(store, wild=issue(tmp_path, "wild", "*.t.example.org"))
    assert store.context_for(name) is None


def test_a_handshake_that_runs_during_a_reload_ends_with_the_certificate_that_it_began_with(tmp_path: Path) -> None:
    store = CertificateStore()
    old = first_fingerprint((files := issue(tmp_path, "one", "one.example.org")).certificate)
    load(store, one=files)
    context = store.context_for("one.example.org")
    assert context is not None
    handshake = Handshake(context)
    handshake.begin()
    new = first_fingerprint(issue(tmp_path, "one", "one.example.org").certificate)
    load(store, one=files)
    assert handshake.finish() == old
    assert shown(store.context_for("one.example.org")) == new != old


def test_a_broken_file_keeps_the_old_certificates(tmp_path: Path) -> None:
    store = CertificateStore()
    one, two = issue(tmp_path, "one", "one.example.org"), issue(tmp_path, "two", "two.example.org")
    store.apply(store.load({"control.tls": one}, {"two": two}))
    old = first_fingerprint(one.certificate), first_fingerprint(two.certificate)
    one.certificate.write_text("nothing of the kind")
    two.key.write_bytes(pem("two.example.org")[1])
    with pytest.raises(ConfigError) as failed:
        store.load({"control.tls": one}, {"two": two})
    assert failed.value.problems == [
        f"control.tls: could not load certificate {one.certificate} with key {one.key}: not PEM files",
        f"two: key {two.key} does not belong to certificate {two.certificate}",
    ]
    assert (shown(store.port("control.tls")), shown(store.context_for("two.example.org"))) == old


def test_a_certificate_that_is_put_is_used_by_the_next_handshake_and_after_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "certificates"
    store = CertificateStore(folder)
    first, second = pem("*.t.example.org", "t.example.org"), pem("*.t.example.org", "t.example.org")
    stored = store.put(*first)
    assert stored.files.certificate == folder / "_wildcard.t.example.org.pem"
    before = shown(store.context_for("blog.t.example.org"))
    assert before == first_fingerprint(stored.files.certificate)
    store.put(*second)
    after = shown(store.context_for("blog.t.example.org"))
    assert after == first_fingerprint(stored.files.certificate) != before
    assert [stat.filemode(path.stat().st_mode) for path in folder.iterdir()] == ["-rw-------"]
    assert stat.filemode(folder.stat().st_mode) == "drwx------"
    later = CertificateStore(folder)
    load(later)
    assert shown(later.context_for("blog.t.example.org")) == after


@pytest.mark.parametrize(
    ("chain", "key", "problem"),
    [
        (pem("a.example.org")[0], pem("a.example.org")[1], "key does not belong to certificate"),
        (b"nothing", pem("a.example.org")[1], "could not load certificate with key: not PEM files"),
        (*pem("192.0.2.1"), "a certificate for '' cannot be stored: it has no host name"),
    ],
)
def test_a_certificate_that_is_invalid_is_not_put(tmp_path: Path, chain: bytes, key: bytes, problem: str) -> None:
    store = CertificateStore(tmp_path)
    store.put(*pem("a.example.org"))
    old = shown(store.context_for("a.example.org"))
    with pytest.raises(ConfigError, match=f"^{problem}"):
        store.put(chain, key)
    assert shown(store.context_for("a.example.org")) == old
    assert [path.name for path in tmp_path.iterdir()] == ["a.example.org.pem"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^could not store a certificate in .*/file/below: not a directory$"):
        CertificateStore(tmp_path / "file" / "below").put(*pem("a.example.org"))
    with pytest.raises(ConfigError, match="no folder for certificates"):
        CertificateStore().put(*pem("a.example.org"))


def test_a_stored_file_that_is_broken_is_reported_and_its_certificate_stays(tmp_path: Path) -> None:
    store = CertificateStore(tmp_path)
    store.put(*pem("a.example.org"))
    store.put(*pem("b.example.org"))
    old = shown(store.context_for("a.example.org"))
    (tmp_path / "a.example.org.pem").write_text("half of it")
    with capture_logs() as logs:
        load(store)
    assert [line["event"] for line in logs] == ["could not load a stored certificate"]
    assert shown(store.context_for("a.example.org")) == old
    assert store.context_for("b.example.org") is not None
    with capture_logs():
        load(fresh := CertificateStore(tmp_path))
    assert fresh.context_for("a.example.org") is None
    assert fresh.context_for("b.example.org") is not None


def test_a_configured_certificate_is_preferred_and_then_the_one_that_expires_last(tmp_path: Path) -> None:
    store = CertificateStore(tmp_path)
    store.put(*pem("b.example.org", "a.example.org", days=30))
    store.put(*pem("a.example.org", days=60))
    store.put(*pem("c.example.org", "a.example.org", days=50))
    assert shown(store.context_for("a.example.org")) == first_fingerprint(tmp_path / "a.example.org.pem")
    configured = tmp_path / "configured"
    configured.mkdir()
    load(store, one=(files := issue(configured, "one", "a.example.org")))
    assert shown(store.context_for("a.example.org")) == first_fingerprint(files.certificate)


def test_contexts_are_bounded_and_loaded_again(tmp_path: Path) -> None:
    store = CertificateStore(tmp_path, max_contexts=2)
    names = [f"{letter}.example.org" for letter in "abc"]
    for name in names:
        store.put(*pem(name))
    b, c = store.context_for("b.example.org"), store.context_for("c.example.org")
    a = store.context_for("a.example.org")  # the third: loaded again, and b, not used for longest, is dropped
    assert store.context_for("c.example.org") is c
    assert store.context_for("a.example.org") is a
    assert store.context_for("b.example.org") is not b
    (tmp_path / "c.example.org.pem").unlink()
    with capture_logs() as logs:
        assert store.context_for("c.example.org") is None
    assert [line["event"] for line in logs] == ["could not load a certificate"]


def test_problems_are_reported_once_per_file_and_logged(tmp_path: Path) -> None:
    made = make_self_signed("relay.example.org", datetime.now(UTC) - LIFE - timedelta(hours=1))
    (tmp_path / "old.pem").write_bytes(made.certificate + made.key)
    old = TlsFiles(certificate=tmp_path / "old.pem", key=tmp_path / "old.pem")
    store = CertificateStore(tmp_path / "stored")
    store.apply(store.load({"control.tls": old, "http.tls": old}))
    stored = store.put(*pem("a.example.org", days=3)).files.certificate
    with capture_logs() as logs:
        assert store.expiring() == [
            f"certificate {old.certificate} has expired",
            f"certificate {stored} expires in 2 days",
        ]
    assert [(line["log_level"], line["event"]) for line in logs] == [
        ("error", "clients reject the certificate"),
        ("warning", "certificate expires soon"),
    ]


def test_names_offer_http_1_1_and_ports_offer_nothing(tmp_path: Path) -> None:
    store = CertificateStore(tmp_path / "stored")
    files = issue(tmp_path, "one", "one.example.org")
    store.apply(store.load({"control.tls": files}, {"one": files}))
    store.put(*pem("two.example.org"))
    client = unverified_tls_context()
    client.set_alpn_protocols(["h2", "http/1.1"])
    for context, expected in (
        (store.context_for("one.example.org"), "http/1.1"),
        (store.context_for("two.example.org"), "http/1.1"),
        (store.port("control.tls"), None),
    ):
        assert context is not None
        handshake = Handshake(context, client)
        handshake.begin()
        handshake.finish()
        assert handshake.protocol == expected


def test_a_configured_certificate_without_a_name_is_an_error(tmp_path: Path) -> None:
    store = CertificateStore()
    with pytest.raises(ConfigError, match=r"^certificate\[0\]: certificate .*one\.pem has no host name"):
        store.load({}, {"certificate[0]": issue(tmp_path, "one", "192.0.2.1")})


def test_a_removed_certificate_is_gone_with_its_file(tmp_path: Path) -> None:
    store = CertificateStore(tmp_path)
    one, wild = store.put(*pem("a.t.example.org")), store.put(*pem("*.t.example.org"))
    store.remove(one)
    store.remove(one)
    assert [path.name for path in tmp_path.iterdir()] == ["_wildcard.t.example.org.pem"]
    assert store.stored() == [wild]
    assert store.certificate_for("a.t.example.org") == wild


def test_a_renewal_with_fewer_names_gives_up_the_others(tmp_path: Path) -> None:
    store = CertificateStore(tmp_path)
    store.put(*pem("a.example.org", "b.example.org"))
    store.put(*pem("a.example.org"))
    assert store.certificate_for("b.example.org") is None
    assert store.stored_for("a.example.org") is not None


# The folder


def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read from now on."""
    files: list[str] = []
    read = ServerCertificate.read

    def noted(file: StoredFile, table: str = "") -> tuple[ServerCertificate, ssl.SSLContext]:
        files.append(file.certificate.name)
        return read(file, table)

    monkeypatch.setattr(ServerCertificate, "read", noted)
    return files


def test_a_start_reads_only_files_that_are_not_in_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = CertificateFolder(tmp_path)
    for name in ("a.example.org", "b.example.org", "c.example.org"):
        first.write(*pem(name))
    files = read_files(monkeypatch)
    found = CertificateFolder(tmp_path).read({})
    assert files == ["a.example.org.pem", "b.example.org.pem", "c.example.org.pem"]
    files.clear()
    assert CertificateFolder(tmp_path).read({}) == found  # from the index
    assert files == []
    (tmp_path / "b.example.org.pem").write_bytes(b"".join(reversed(pem("b.example.org"))))
    (tmp_path / "c.example.org.pem").unlink()
    again = CertificateFolder(tmp_path).read({})
    assert files == ["b.example.org.pem"]
    assert [each.names for each in again] == [("a.example.org",), ("b.example.org",)]
    assert again[1] != found[1]
    assert stat.filemode((tmp_path / INDEX).stat().st_mode) == "-rw-------"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a.example.org.pem": [1]}', b'{"a.example.org.pem": 1}', b"\xff"])
def test_a_broken_index_costs_time_only(tmp_path: Path, content: bytes) -> None:
    folder = CertificateFolder(tmp_path)
    folder.write(*pem("a.example.org"))
    (tmp_path / INDEX).write_bytes(content)
    assert [each.names for each in CertificateFolder(tmp_path).read({})] == [("a.example.org",)]


def test_the_index_is_written_again_after_so_many_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunneld.tls.folder, "INDEX_EVERY", 3)
    folder = CertificateFolder(tmp_path)
    folder.read({})
    for number in range(4):
        folder.write(*pem(f"{number}.example.org"))
    files = read_files(monkeypatch)
    assert len(CertificateFolder(tmp_path).read({})) == 4
    assert files == ["3.example.org.pem"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_index_belongs_to_the_owner_of_the_folder(tmp_path: Path) -> None:
    folder = CertificateFolder(tmp_path)
    folder.write(*pem("a.example.org"))
    os.chown(tmp_path, 1234, 1235)  # the daemon starts as root, and then becomes its user
    folder.read({})
    about = (tmp_path / INDEX).stat()
    assert (about.st_uid, about.st_gid) == (1234, 1235)
