"""The HTTP service: XML-RPC, the GET servlet, JSON, health and metrics, all of them over one table of commands.

    POST     /RPC2  /                   XML-RPC: tunnel.openTunnel, tunnel.getTunnelAddress, ...   rpc.py
    GET POST /tristero/servlet/tunnel   ?method=openTunnel, ?method=getTunnelAddress&uri=...       servlet.py
    GET POST /api/v1/VERB               JSON; watch as a stream of lines                           api.py
    GET      /healthz  /readyz          for supervisors                                            app.py
    GET      /metrics                   for Prometheus                                  metrics.py, tunnel_metrics.py
    GET      /                          the web page; for programs, this table                     page/, app.py

A request passes these modules, outermost first:

    server.py      accepts and counts connections, does TLS
    connection.py  moves bytes to and from Hypercorn, which parses requests; bounds the time of everything
    responses.py   adds headers to every response; turns an unexpected exception into a 500; discards unread bodies
    origin.py      refuses requests that a page of another site could send through a browser
    auth.py        authenticates the request by a credential or a client certificate
    app.py         routes the request
    an endpoint    makes a `ControlRequest` of it (translate.py), executes it, and formats the answer
"""

from __future__ import annotations

from tunneld.http.server import serve

__all__ = ["serve"]
