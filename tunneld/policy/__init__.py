"""What is allowed, all of it pure: who may open tunnels, who may visit one, how much of it, and whose an address is."""
