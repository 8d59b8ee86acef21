"""The file of reservations survives the failures of processes and disks, and reports what it cannot use."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tunneld.directory.database import APPLICATION_ID, FILE_NAME, FORMAT_VERSION, FROM_VERSION_1, Database
from tunneld.errors import StoreError
from tunneld.net.address import HostName, Port
from tunneld.net.endpoint import Endpoint
from tunneld.policy.reservations import Reservation, ReservationKey

BLOG = ReservationKey("alice", "blog")


def record(holder: ReservationKey = BLOG, port: int = 20080, expires: float | None = None) -> Reservation:
    return Reservation(
        holder, "webmux", (Port(port),), Endpoint("webmuxs", "::1", 7012, "a-key_of-24-characters"), expires
    )


def change(each: Reservation) -> tuple[ReservationKey, Reservation]:
    return each.holder, each


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "state")
    yield made
    made.close()


def reopened(database: Database) -> list[Reservation]:
    database.close()
    again = Database(database.path.parent)
    records, invalid = again.load()
    again.close()
    assert invalid == 0
    return records


def test_written_reservations_are_loaded_after_reopening(database: Database) -> None:
    shop = record(ReservationKey("", "shop", "2001:db8::1"), 20081, 1.5e9)
    database.write([change(record()), change(shop), change(record(ReservationKey("bob", "gone"), 9))])
    database.write([(ReservationKey("bob", "gone"), None), change(record(port=20090))])
    assert sorted(reopened(database), key=lambda each: each.client_port or 0) == [shop, record(port=20090)]


def test_host_names_are_stored_beside_ports(database: Database) -> None:
    server = Endpoint("webmuxs", "::1", 7012, "key")
    named = Reservation(BLOG, "webmux", (HostName("blog.example.org"), Port(20080)), server)
    database.write([change(named)])
    assert reopened(database) == [named]


def test_bytes_that_count_against_a_quota_are_stored(database: Database) -> None:
    metered = replace(record(), metered=1 << 40)
    database.write([change(metered)])
    assert reopened(database) == [metered]


VERSION_1 = f"""
CREATE TABLE reservation (
    credential TEXT NOT NULL,  -- empty without credentials
    host TEXT NOT NULL,        -- the requester's address, or empty
    name TEXT NOT NULL,
    backend TEXT NOT NULL,
    client_port INTEGER NOT NULL,
    server TEXT NOT NULL,      -- the server URI with its key
    expires REAL,              -- seconds since 1970; NULL while the tunnel is open
    PRIMARY KEY (credential, host, name)
) WITHOUT ROWID;
INSERT INTO reservation VALUES
    ('alice', '', 'blog', 'webmux', 20080, 'webmuxs://[::1]:7012/a-key_of-24-characters', NULL),
    ('', '2001:db8::1', 'shop', 'tcp', 20081, 'tcp://[::1]:20082', 1.5e9);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
"""
"""What the schema of version 1 wrote."""


def test_a_file_of_version_1_is_converted_and_keeps_its_reservations(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.executescript(VERSION_1)
    shop = ReservationKey("", "shop", "2001:db8::1")
    both = [record(), Reservation(shop, "tcp", (Port(20081),), Endpoint("tcp", "::1", 20082), 1.5e9)]
    converted = Database(tmp_path)
    assert converted.load() == (both, 0)
    converted.write([change(record(port=20090))])
    assert reopened(converted) == [record(port=20090), both[1]]


def test_an_interrupted_conversion_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.executescript(VERSION_1)
    with monkeypatch.context() as patch:
        broken = (*FROM_VERSION_1[:2], "INSERT INTO nowhere VALUES (1)")
        patch.setattr("tunneld.directory.database.FROM_VERSION_1", broken)
        with pytest.raises(StoreError, match="no such table: nowhere"):
            Database(tmp_path)
    converted = Database(tmp_path)
    assert len(reopened(converted)) == 2


def test_the_whole_content_can_be_replaced(database: Database) -> None:
    database.write([change(record()), change(record(ReservationKey("bob", "x"), 1))])
    database.write([change(record(port=5))], everything=True)
    assert reopened(database) == [record(port=5)]


def test_only_the_owner_may_read_the_files(database: Database) -> None:
    database.write([change(record())])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in database.path.parent.iterdir()}
    assert modes == {FILE_NAME: 0o600, f"{FILE_NAME}-wal": 0o600}
    assert stat.S_IMODE(database.path.parent.stat().st_mode) == 0o700


def test_a_file_with_a_wider_mode_is_restricted(database: Database) -> None:
    database.close()
    database.path.chmod(0o644)
    Database(database.path.parent).close()
    assert stat.S_IMODE(database.path.stat().st_mode) == 0o600


def test_two_daemons_do_not_share_a_file(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunneld.directory.sqlite_file.LOCK_TIMEOUT", 0.01)
    with pytest.raises(StoreError, match=r"reservations\.db: in use by another process"):
        Database(database.path.parent)


def test_a_file_of_another_format_version_is_not_changed(database: Database) -> None:
    database.close()
    with sqlite3.connect(database.path) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
    connection.close()
    before = database.path.read_bytes()
    with pytest.raises(
        StoreError,
        match=f"its format version is {FORMAT_VERSION + 1}, and this tunneld supports {FORMAT_VERSION}; it was not",
    ):
        Database(database.path.parent)
    assert database.path.read_bytes() == before


def test_a_database_of_another_program_is_not_changed(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(StoreError, match="belongs to another program and was not changed"):
        Database(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_a_damaged_file_is_moved_aside_and_a_new_one_started(database: Database) -> None:
    database.write([change(record())])
    database.close()
    database.path.write_bytes(b"not a database at all" * 100)
    again = Database(database.path.parent)
    assert again.damage == "file is not a database"
    assert again.load() == ([], 0)
    assert database.path.with_name(f"{FILE_NAME}.damaged").read_bytes().startswith(b"not a database")
    again.write([change(record())])
    assert reopened(again) == [record()]


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_survived(database: Database, seed: int) -> None:
    """Bytes of the file are changed at random: it opens, with the rest or moved aside, or raises the reason."""
    database.write([change(record(ReservationKey("alice", f"n{number}"), number + 1)) for number in range(300)])
    database.close()
    dice = random.Random(seed)
    content = bytearray(database.path.read_bytes())
    for _ in range(dice.randrange(1, 200)):
        content[dice.randrange(len(content))] = dice.randrange(256)
    database.path.write_bytes(content[: dice.randrange(len(content))] if seed % 3 == 0 else content)
    with suppress(StoreError), closing(Database(database.path.parent)) as again:
        assert len(again.load()[0]) <= 300
        again.write([change(record())])


def test_invalid_rows_are_counted_and_ignored(database: Database) -> None:
    database.write([change(record())])
    for row in (("a", "", "b", "tcp", "70000", "tcp://h:1", None, 0), ("a", "", "c", "tcp", "1", "nonsense", None, 0)):
        database.connection.execute("INSERT INTO reservation VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    assert database.load() == ([record()], 2)


def test_the_error_names_a_directory_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=f"{tmp_path}/file.*: not a directory"):
        Database(tmp_path / "file" / "state")


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        Database(tmp_path)
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_a_full_disk_changes_nothing_and_is_recovered_from(database: Database) -> None:
    """SQLite's own limit of pages takes the place of the disk: it also fails in the middle of a transaction."""
    database.write([change(record())])
    pages = database.connection.execute("PRAGMA page_count").fetchone()[0]
    database.connection.execute(f"PRAGMA max_page_count = {pages}")
    many = [change(record(ReservationKey("alice", f"n{number}"), number + 1)) for number in range(1000)]
    with pytest.raises(StoreError, match="database or disk is full"):
        database.write(many)
    assert database.load() == ([record()], 0)
    database.connection.execute("PRAGMA max_page_count = 100000")
    database.write(many)
    assert len(database.load()[0]) == 1001


WRITER = """
import sys
from pathlib import Path
from tests.directory.test_database import change, record
from tunneld.policy.reservations import ReservationKey
from tunneld.directory.database import Database

database = Database(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    database.write([change(record(ReservationKey("alice", f"n{number % 50}"), number % 60000 + 1))])
    print(number, flush=True)
"""


@pytest.mark.parametrize("seed", range(8))
def test_acknowledged_writes_survive_kill_9_at_any_moment(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    acknowledged = 0
    for _ in range(3):  # more than once on the same file
        with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(dice.randrange(1, 40)):
                acknowledged = int(writer.stdout.readline())
            os.kill(writer.pid, signal.SIGKILL)
            for line in writer.stdout.read().split():
                acknowledged = int(line)
        database = Database(tmp_path)
        records, invalid = database.load()
        database.close()
        assert not database.damage
        assert invalid == 0
        ports = {each.holder.name: each.client_port for each in records}
        # The next write may be stored though it was not acknowledged: its name, 50 writes ago, is excluded.
        for number in range(max(1, acknowledged - 48), acknowledged + 1):
            assert ports[f"n{number % 50}"] == number + 1


def test_the_header_of_the_file_has_the_application_id_and_version(database: Database) -> None:
    database.close()
    header = database.path.read_bytes()[:100]
    assert int.from_bytes(header[68:72], "big") == APPLICATION_ID
    assert int.from_bytes(header[60:64], "big") == FORMAT_VERSION
