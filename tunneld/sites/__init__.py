"""Host names: visitors of many tunnels on shared ports, told apart by the name that they ask for.

Ports and names
    ports         the shared ports for HTTP and TLS
    peek          reads the first bytes of a connection, and leaves them unread for the next
    handshakes    TLS with visitors, which may wait for the certificate of a new name; `tls_accept` is one handshake
    port_places   how many connections there may be
    proofs        whether a domain is a user's own
    names         the table of names, and where visitors reach them
    site          the contracts: of a tunnel with a name (tunnel/ingress/host.py), and of what has certificates

One connection of a visitor
    connection    requests are routed one by one; `end_owner` is how it fails, `endings` what comes behind the requests
    input         what the visitor sends, cut into heads and bodies
    stream        the requests for one tunnel, as an end that the tunnel relays like any other visitor; it calls
                  `receivers`
    http2         streams of HTTP/2, each as a connection of HTTP/1.1; `http2_stream` is one
    heads, body   messages as they pass
    fields        where a request comes from, and which host it is for; pure
    pages         the answers of the relay itself; pure
    deadline      a deadline that moves often

Who may see a site
    guard         decides about each request: passwords, links, an authentication server
    access        what is read from a request, and which answer it gets; pure
    forward_auth  asks an authentication server
    links         links that expire
    access_log    a line for each request
"""
