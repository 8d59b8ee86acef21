"""The file of trusted peers, and this user's identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunneld.config.trust import TrustedPeers, identity_path, load_identity
from tunneld.errors import ConfigError, UsageError
from tunneld.net.address import Private
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity

ALICE, BOB = NodeId(bytes(20)), NodeId(bytes([0xFB]) * 20)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "tunneld"


def test_peers_are_added_found_and_removed(home: Path) -> None:
    peers = TrustedPeers()
    assert peers.all() == {}
    peers.add("alice", ALICE)
    peers.add("bob", BOB)
    peers.add("bob", BOB)  # once more
    assert TrustedPeers().all() == {"alice": ALICE, "bob": BOB}
    assert peers.find("alice") == peers.find(str(ALICE)) == ALICE
    assert peers.name_of(BOB) == "bob"
    assert peers.resolve("shell@bob") == peers.resolve(f"shell@{BOB}") == Private(BOB, "shell")
    assert (home / "trusted").stat().st_mode & 0o777 == 0o600
    peers.remove("bob")
    assert peers.name_of(BOB) == ""
    assert list(home.iterdir()) == [home / "trusted"]


def test_a_peer_is_never_replaced(home: Path) -> None:
    peers = TrustedPeers()
    peers.add("alice", ALICE)
    with pytest.raises(UsageError, match="tunnel trust remove alice"):
        peers.add("alice", BOB)
    assert peers.find("alice") == ALICE


def test_a_changed_file_is_read_again(home: Path) -> None:
    running = TrustedPeers()
    running.all()
    TrustedPeers().add("alice", ALICE)
    assert running.name_of(ALICE) == "alice"
    TrustedPeers().remove("alice")
    assert running.name_of(ALICE) == ""
    (home / "trusted").unlink()
    assert running.all() == {}


def test_comments_and_blank_lines(home: Path) -> None:
    home.mkdir()
    (home / "trusted").write_text(f"# friends\n\n  alice\t{ALICE}  # from the telephone\n")
    assert TrustedPeers().all() == {"alice": ALICE}


@pytest.mark.parametrize("line", ["alice", f"alice {ALICE} more", "alice nonsense", "alice " + str(ALICE)[:-1] + "B"])
def test_damaged_lines_are_named(home: Path, line: str) -> None:
    home.mkdir()
    (home / "trusted").write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match=r"trusted:2: "):
        TrustedPeers().all()


@pytest.mark.parametrize("name", ["", "-bob", "a b", "x" * 65, "bob\n"])
def test_names_that_cannot_be(home: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a name"):
        TrustedPeers().add(name, ALICE)


def test_unknown_peers(home: Path) -> None:
    with pytest.raises(UsageError, match="tunnel trust add carol ID"):
        TrustedPeers().find("carol")
    with pytest.raises(UsageError, match="whose tunnel"):
        TrustedPeers().resolve("shell")
    with pytest.raises(UsageError, match="tunnel trust list"):
        TrustedPeers().remove("carol")


def test_the_identity(home: Path) -> None:
    with pytest.raises(UsageError, match="tunnel identity create"):
        load_identity()
    made = Identity.create()
    made.save(identity_path())
    assert load_identity() == made
    assert identity_path() == home / "identity.pem"
