"""The HTTP face: XML-RPC, the GET servlet, JSON, health and metrics, all of them over the one table of commands.

    POST     /RPC2  /                       XML-RPC: tunnel.openTunnel, tunnel.getTunnelAddress, ...      rpc.py
    GET POST /tristero/servlet/tunnel       ?method=openTunnel, ?method=getTunnelAddress&uri=...          servlet.py
    GET POST /api/v1/VERB                   JSON; watch as a stream of lines                              api.py
    GET      /healthz  /readyz              for supervisors                                               app.py
    GET      /metrics                       for Prometheus                                                metrics.py
    GET      /                              this table, for people                                        app.py

A request passes these rooms, outermost first:

    server.py      accepts and counts connections
    connection.py  octets to and from Hypercorn, which makes requests of them: all of it bounded in time
    shell.py       headers of every response; an exception that nobody meant becomes a 500; bodies nobody wanted go
    guard.py       turns away what a page on another site could send through a visitor's browser
    porter.py      finds out who asks, by a name and a secret
    app.py         routes
    a face         makes a `Request` of it (words.py), carries it out, and words the answer
"""

from __future__ import annotations

from tunneld.http.server import serve

__all__ = ["serve"]
