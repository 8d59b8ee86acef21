"""Certificate files: relative to the folder of the configuration, and checked while it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from tunneld.config import load
from tunneld.errors import ConfigError

PAIR = '[control.tls]\ncertificate = "relay.pem"\nkey = "{key}"\n'


def written(folder: Path, content: str) -> Path:
    path = folder / "tunnel.toml"
    path.write_text(content)
    return path


def problem(folder: Path, content: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(written(folder, content))
    (sentence,) = caught.value.problems
    return (
        sentence.removeprefix(f"{folder / 'tunnel.toml'}: ")
        .replace(str(folder).replace('"', '\\"'), "FOLDER")
        .replace(str(folder), "FOLDER")
    )


def test_relative_paths_start_from_the_folder_of_the_file(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(certificates, PAIR.format(key="relay.key"))
    monkeypatch.chdir(certificates.parent)
    tls = load(Path(path.parent.name) / path.name).control.tls
    assert tls is not None
    assert (tls.certificate, tls.key) == (certificates / "relay.pem", certificates / "relay.key")


def test_symbolic_links_are_not_resolved(certificates: Path, tmp_path: Path) -> None:
    """A renewed certificate is another file behind the same link."""
    for name in ("relay.pem", "relay.key"):
        (tmp_path / name).symlink_to(certificates / name)
    tls = load(written(tmp_path, PAIR.format(key="relay.key"))).control.tls
    assert tls is not None
    assert tls.key == tmp_path / "relay.key"


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("none.key", 'control.tls.key: could not read "FOLDER/none.key": no such file or directory'),
        (".", 'control.tls.key: could not read "FOLDER": is a directory'),
        ("other.key", "control.tls: key FOLDER/other.key does not belong to certificate FOLDER/relay.pem"),
        (
            "tunnel.toml",
            "control.tls: could not load certificate FOLDER/relay.pem with key FOLDER/tunnel.toml: not PEM files",
        ),
        (
            "locked.key",
            "control.tls: the key is protected by a passphrase, which a daemon cannot ask for; remove the passphrase",
        ),
        ("a\\u0000b", 'control.tls.key: "FOLDER/a\\u0000b" is not a path: it contains a zero byte or is not UTF-8'),
    ],
)
def test_an_unusable_key_is_an_error(certificates: Path, tmp_path: Path, key: str, sentence: str) -> None:
    for name in ("relay.pem", "other.key"):
        (tmp_path / name).symlink_to(certificates / name)
    plain = serialization.load_pem_private_key((certificates / "relay.key").read_bytes(), None)
    (tmp_path / "locked.key").write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    assert problem(tmp_path, PAIR.format(key=key)) == sentence


def test_a_client_ca_without_a_certificate_is_refused(certificates: Path) -> None:
    content = PAIR.format(key="relay.key") + 'client_ca = "relay.key"\n'
    assert problem(certificates, content) == "control.tls: client_ca FOLDER/relay.key contains no PEM certificate"
