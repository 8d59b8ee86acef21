"""Addresses and sockets: URIs and networks (`endpoint`), binding and tuning sockets (`sockets`), listeners that a reload
can move (`listeners`), dialling with a deadline (`dial`).
"""
