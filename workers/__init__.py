"""What runs inside a Ray task or a node's agent: small functions over files and sockets."""

if __name__ != "crucible.workers":  # one module must never live under two names
    raise ImportError("import this package as crucible.workers")
