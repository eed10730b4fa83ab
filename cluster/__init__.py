"""The coordinator's mind: resolve, plan, place, catalog, track. Pure but for `coordinator` and `drive`."""

if __name__ != "crucible.cluster":  # one module must never live under two names
    raise ImportError("import this package as crucible.cluster")
