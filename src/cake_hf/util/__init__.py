"""Small helpers that do not depend on KV: locks that survive a fork, redaction, sizes, environment variables."""
