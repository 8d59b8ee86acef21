"""The salts of names without a verifier: stable, of any length, and without a pattern."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunneld.config import file
from tunneld.config.salts import (
    KEY_BYTES,
    KEY_FILE,
    PROCESS_KEY,
    derive_salt,
    read_salt_key,
    state_folder_of,
    store_salt_key,
)

KEY = bytes(range(KEY_BYTES))


@pytest.mark.parametrize("length", [1, 16, 32, 33, 64, 200])
def test_a_salt_has_its_length_and_repeats_no_part_of_itself(length: int) -> None:
    """Once, a salt of 32 bytes consisted of 16 bytes and the same again, which no random salt does."""
    salt = derive_salt(KEY, "unknown", length)
    assert len(salt) == length
    parts = [salt[start : start + 16] for start in range(0, length, 16)]
    assert len(set(parts)) == len(parts)
    assert salt == derive_salt(KEY, "unknown", length)
    assert length == 1 or salt != derive_salt(KEY, "unknown too", length)


def test_the_key_survives_a_restart_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert read_salt_key(folder) == PROCESS_KEY
    store_salt_key(folder, KEY)
    assert read_salt_key(folder) == KEY
    assert (folder / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert [each.name for each in folder.iterdir()] == [KEY_FILE]


@pytest.mark.parametrize("content", [b"", b"short", bytes(KEY_BYTES + 1)])
def test_a_file_that_is_no_key_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / KEY_FILE).write_bytes(content)
    assert read_salt_key(tmp_path) == PROCESS_KEY
    store_salt_key(tmp_path, PROCESS_KEY)
    assert (tmp_path / KEY_FILE).read_bytes() == PROCESS_KEY


def test_without_a_state_folder_the_key_lasts_as_long_as_the_process(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (None, tmp_path / "file" / "state"):
        store_salt_key(folder, KEY)
        assert read_salt_key(folder) == PROCESS_KEY


def test_a_secret_in_a_file_gets_the_salt_of_the_stored_key(tmp_path: Path) -> None:
    store_salt_key(tmp_path / "state", KEY)
    (tmp_path / "secret").write_text("a secret of alice\n")
    text = '[daemon]\nstate = "state"\n[[credential]]\nname = "alice"\nsecret_file = "secret"\n'
    (credential,) = file.parse(text.encode(), tmp_path).credential
    assert credential.proof is not None
    assert credential.proof.salt == derive_salt(KEY, "alice")


@pytest.mark.parametrize("tables", [{"daemon": {"state": 7}}, {"daemon": 7}, {"daemon": {"state": "\0"}}, {}])
def test_a_malformed_state_folder_is_left_to_the_check_of_the_file(tmp_path: Path, tables: dict[str, object]) -> None:
    read_salt_key(state_folder_of(tables, tmp_path))
