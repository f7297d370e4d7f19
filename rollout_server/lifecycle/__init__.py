"""The server's state, and the one order in which it changes."""
