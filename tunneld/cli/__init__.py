"""The command lines: `tunneld`, the daemon, and `tunnel`, for users and operators."""
