"""The inspector: shows the HTTP requests and responses that pass through an agent, and sends them again.

    recorder         copies what passes in a bounded backlog, and parses it later
    conversation       one connection: which response belongs to which request; its two sides
    framing            where messages begin and end; websocket: frames
    store            the newest exchanges, within a number of bytes; records: what one has
    inspector        runs both, and the page
    web                its HTTP server: h11 on Trio
    pages              what the page may ask for: token, Host, Origin
    search, views      which exchanges match, and what is shown of them
    content            bodies: decompressed, text
    redaction          secrets in heads
    export             curl commands, HAR files
    replay             sends a request again, to the local server; requests: what the page asks for
    page/              the page itself: HTML, CSS, JavaScript
    settings         where it listens, and what it keeps

The agent gives it a tap of each connection to the local server (agent/inspection.py, engine/tapped.py). A fault in what
passes, or here, never reaches the relay.
"""
