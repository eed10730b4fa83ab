"""One reader a format: bytes in, Arrow record batches out."""
