"""The node's store: shards, manifests and partial downloads on disk."""
