"""The systems, one file each: how a user of that system would keep the KV of a document."""
