"""The two commands: `tunneld`, the daemon, and `tunnel`, the person's command."""
