"""Real certificates in a folder with names that need quoting in TOML."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with relay.pem, relay.key and clients.pem, the same under names that need quoting, and other.key."""
    folder = tmp_path_factory.mktemp('a "folder" with ümläuts')
    authority = trustme.CA()
    relay, other = authority.issue_cert("relay.example.org"), authority.issue_cert("other.example.org")
    for prefix in ("", "it's #1 \\ "):
        for blob in relay.cert_chain_pems:
            blob.write_to_path(str(folder / f"{prefix}relay.pem"), append=True)
        relay.private_key_pem.write_to_path(str(folder / f"{prefix}relay.key"))
        authority.cert_pem.write_to_path(str(folder / f"{prefix}clients.pem"))
    other.private_key_pem.write_to_path(str(folder / "other.key"))
    return folder
