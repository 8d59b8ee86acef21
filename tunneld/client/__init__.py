"""The client's side of the control protocol, for the agent, the command line and Trio programs. Imports no daemon code.

client      one control connection, with the verbs as methods
exchange    requests and replies in order
transport   the connection: TCP, perhaps TLS
login       the client's side of authentication
"""

from tunneld.client.client import Client, connect

__all__ = ["Client", "connect"]
