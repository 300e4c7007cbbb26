"""Small helpers that know nothing of KV: locks that survive a fork, redaction, sizes, environment variables."""
