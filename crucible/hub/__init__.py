"""The Hub: a client for reading repos, and a server that is one (`crucible.hub.server`)."""
