"""The check of a name and a secret sent in clear: the same for the Authorization header and the form of the page."""

from __future__ import annotations

from http import HTTPStatus

from tunneld.auth.authenticator import Authenticator
from tunneld.config.credentials import Credential
from tunneld.http.problems import http_error
from tunneld.policy.access import Grant
from tunneld.wire.scram import FAILED

Admitted = tuple[Credential, Grant]
"""A credential, and what it may do now."""


async def check_secret(
    authenticator: Authenticator, host: str, login: tuple[str, str] | None, challenge: str, malformed: str = ""
) -> Credential:
    """The credential with this name and secret, for a client at `host`. None is a login that is `malformed`.

    Raises `HttpError`: if there is none, with the `challenge`; or if the name or the address has a penalty.
    """
    name = login[0] if login else ""
    _check_block(authenticator, host, name)
    credential = await authenticator.admit_secret(*login, host) if login else None
    _check_block(authenticator, host, name)  # else parallel connections allow guesses
    if credential is None:
        authenticator.log_failure(host, "http", FAILED if login else malformed, name)
        raise http_error(HTTPStatus.UNAUTHORIZED, FAILED, WWW_Authenticate=challenge)
    return credential


def _check_block(authenticator: Authenticator, host: str, name: str) -> None:
    """Refuse a name or an address with a penalty, in the same way whether the secret is correct or not."""
    if (block := authenticator.block(host, name)) is not None:
        seconds = f"{max(1, round(block.seconds))}"
        raise http_error(HTTPStatus.TOO_MANY_REQUESTS, block.reason, Retry_After=seconds, Connection="close")
