"""The web page of the relay: a client of the control verbs like any other, for people.

    GET   /                 the page, or the login form                                     files.py
    GET   /page/NAME        scripts, style sheet and icon, from static/                     files.py
    POST  /page/login       {"name": ..., "secret": ...}: a session                         login.py
    POST  /page/logout      the end of a session                                            login.py
    GET   /page/stream      snapshots and events as server-sent events                      stream.py

Everything else that the page shows or does is a request to `/api/v1`, see api.py: the roles and what each credential
may see are decided there, by the verbs, and nowhere else.

    execute (list, show, status, watch) ──► Feed, one for each view ──► PageStream, one for each visible page
                                            takes snapshots             sends what has changed

A session has two halves: a cookie, which no script can read, and a token, which the page sends in a header with every
request. Browsers send cookies to all ports of a host, so on loopback any program that the operator visits would get the
cookie; and they let the scripts of one origin read its storage, where the token is. Neither is worth anything alone.
"""
