"""The other end of the control protocol, for the agent, the command line and Trio programs; it knows no daemon.

client      one connection, and the verbs as methods
exchange    requests out, replies and events in, in their order
login       the client's half of authentication
"""

from tunneld.client.client import Client, connect

__all__ = ["Client", "connect"]
