"""Authentication for every port: credentials and grants (`authenticator`), limits and penalties for unauthenticated
connections (`preauth`), and the tasks that run handshakes under a deadline (`handshakes`).
"""
