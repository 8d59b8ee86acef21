"""Host names: visitors of many tunnels on one shared port, told apart by the name that they ask for.

fields      the fields of requests and responses as they pass: where a request comes from, which host it is for
pages       the answers of the relay itself
"""
