"""Files of invitations: for one tunnel, once, for some time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tunneld.agent import invitations
from tunneld.agent.invitations import Invitations
from tunneld.errors import UsageError
from tunneld.tls.one_time import OneTimeCode


@pytest.fixture
def store(tmp_path: Path) -> Invitations:
    return Invitations(tmp_path / "invitations")


def test_an_invitation_is_for_one_tunnel_and_one_visitor(store: Invitations, tmp_path: Path) -> None:
    code, other = OneTimeCode.create(), OneTimeCode.create()
    store.add("shell", code, 60)
    found = store.find(code.visitor.id, "shell")
    assert found is not None
    assert found.host == code.host
    assert store.find(code.visitor.id, "web") is None
    assert store.find(other.visitor.id, "shell") is None
    (path,) = (tmp_path / "invitations").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert code.symbols not in path.read_text()


def test_it_is_used_up_once(store: Invitations) -> None:
    code = OneTimeCode.create()
    store.add("shell", code, 60)
    assert store.use_up(code.visitor.id)
    assert not store.use_up(code.visitor.id)
    assert store.find(code.visitor.id, "shell") is None


def test_it_expires_and_is_removed(store: Invitations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, now = OneTimeCode.create(), time.time()
    store.add("shell", code, 60)
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert store.find(code.visitor.id, "shell") is None
    store.add("shell", OneTimeCode.create(), 60)
    assert len(list((tmp_path / "invitations").iterdir())) == 1


def test_there_are_not_too_many(store: Invitations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invitations, "MAX_INVITATIONS", 1)
    store.add("shell", OneTimeCode.create(), 60)
    with pytest.raises(UsageError, match="have not expired yet"):
        store.add("shell", OneTimeCode.create(), 60)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"tunnel":"shell","seed":"00","expires":9e9}', b"\xff" * 2000]
)
def test_damaged_files_invite_nobody(store: Invitations, tmp_path: Path, content: bytes) -> None:
    code = OneTimeCode.create()
    store.add("shell", code, 60)
    (tmp_path / "invitations" / str(code.visitor.id)).write_bytes(content)
    assert store.find(code.visitor.id, "shell") is None
