"""Certificates for host names from an ACME authority (RFC 8555), such as Let's Encrypt.

    manager      the task that orders and renews the certificates of all host names of a relay
    schedule     when a certificate is due, when a failed order is tried again, how many orders there may be; pure
    orders       the blocking work of an order, for worker threads
    issuer       speaks the protocol, with the `acme` package of the Certbot project
    challenges   proves to the authority that the relay answers for a name; `dns_update` is one way (RFC 2136)
    state        what survives a restart: accounts and failures
    standalone   ports that answer challenges while no relay runs

`orders` and what it uses are imported when the first order is placed, so that a relay without `[acme]` does not pay for
the libraries.
"""
