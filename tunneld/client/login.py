"""The client's side of authentication: it proves that it knows the secret, and checks that the relay knows it, too.

A relay that does not know the secret is an impostor, whatever its address, and would receive the data of every tunnel
opened there. So a given credential is either used, or the connection ends.
"""

from __future__ import annotations

import secrets

import trio

from tunneld.client.exchange import ControlExchange
from tunneld.errors import NotAllowedError, RefusedError, RemoteProtocolError, UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.wire import scram
from tunneld.wire.lines import ControlRequest
from tunneld.wire.scram import ScramClient
from tunneld.wire.verifier import MECHANISM

NONCE_BYTES = 18
"""Random bytes of a nonce, 24 characters: it never repeats."""


async def authenticate(
    exchange: ControlExchange,
    relay: Endpoint,
    method: str,
    credential: tuple[str, str] | None,
    secret_source: str = "",
) -> None:
    """Authenticate with the `method` that the greeting's `auth=` requires; `credential` is a name and its secret.
    `secret_source` says where the secret comes from, for error messages.

    Raises `NotAllowedError` if that is impossible with this credential, `RefusedError` if the relay refuses it,
    `RemoteProtocolError` if the relay does not know the secret, and as `ControlExchange.request`.
    """
    if method == "none" and credential is not None:
        raise NotAllowedError(
            f"relay {relay} does not use credentials, so it cannot prove that it knows the secret of {credential[0]!r} "
            "and may be an impostor; to connect without authentication, leave out --credential"
        )
    if method == "none" or (method == "certificate" and relay.scheme == "tls"):
        return  # in TLS both sides have shown certificates and checked them
    if method != MECHANISM.lower():
        raise NotAllowedError(
            f"relay {relay} requires the authentication method {method!r}, which this program does not support"
        )
    if credential is None:
        raise NotAllowedError(f"relay {relay} requires authentication: use --credential NAME and --secret-file FILE")
    await _log_in(exchange, relay, ScramClient(*credential, secrets.token_urlsafe(NONCE_BYTES)), secret_source)


async def _log_in(exchange: ControlExchange, relay: Endpoint, login: ScramClient, secret_source: str) -> None:
    """Run the two steps of RFC 5802 §3. The slow key derivation runs in a thread."""
    try:
        challenge = await _send_message(exchange, MECHANISM, scram.encode(login.message, padded=False))
        proof = await trio.to_thread.run_sync(login.prove, challenge)
        proof.check(await _send_message(exchange, scram.encode(proof.message, padded=False)))
    except RefusedError as error:
        origin = f", which is from {secret_source}" if secret_source else ""
        advice = f"; check the name and the secret{origin}" if error.reply_code == NotAllowedError.code else ""
        raise RefusedError(
            error.reply_code, f"relay {relay} refused the credential {login.name!r}: {error}{advice}"
        ) from None
    except RemoteProtocolError as error:
        raise RemoteProtocolError(
            f"relay {relay} failed to prove that it knows the secret of {login.name!r}: {error}; it may be an impostor"
        ) from None


async def _send_message(exchange: ControlExchange, *words: str) -> bytes:
    """Send one `auth` request and decode the message in its answer. Raises `RemoteProtocolError` for an invalid one."""
    text = (await exchange.request(ControlRequest("auth", words))).text
    try:
        return scram.decode(text)
    except UsageError as error:
        raise RemoteProtocolError(f"invalid message: {error}") from None
