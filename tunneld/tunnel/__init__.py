"""One tunnel: a nursery, a phase, its ingresses and its server side.

spec         the request for a tunnel, resolved, before it opens
tunnel       the tunnel: its nursery, its phase, what it consists of
ingress/     where visitors come from: a port, or a host name on the ports that names share
visitor      a visitor: its end, and what is known of it
waiting      the queue: pairs visitors with server connections
visitors     the relayed ones: accepted or refused, relayed, counted
servers      which hidden servers may connect, and what follows
server_side  the contract between a tunnel and its backend, and what a dialled connection can do
keys         the keys in the server URIs of ports that tunnels share
tenants      what all tunnels of one owner share
agents       the agents of a tunnel, and the addresses that server connections may come from
timeouts     the times after which a tunnel closes
events       the events of `watch`
records      the records of visitors that have left
snapshot     what one process hands over to the next

The way of a visitor, and where something new would plug in:

    client ──► Ingress ──Visitor──► WaitingVisitors ──dial──► ServerSide        hidden server ──► backends/
                  │                       │                        │
    a kind of address: a UDP port,        │     a way to the hidden server: EGTP messages, another node of a cluster
    another person's agent                ▼
                                    VisitorRelays ──► engine    a kind of end: TLS ended here, an encrypted private
                                                                stream, a flow of datagrams: `engine.end.End`

    a host name     is there: ingress/host.py. The shared ports (sites/) have a table from names to ingresses, and pass
                    the requests of a visitor to one of them as an end
    a UDP port      ingress/ gets a file and net/address.py a class; one visitor per client address, whose end is a flow
    a private port  ingress/ gets a file; `Visitor.credential` is set, and policy/admission gets a rule for it
    a remote node   backends/ gets a file: its `dial` opens a connection to the node that has the hidden server

Nothing here asks which ingress or which backend it is. What concerns all tunnels is elsewhere: which ones exist, and
which addresses are reserved, in directory/; the limits in policy/.
"""
