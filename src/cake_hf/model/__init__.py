"""Identity and behaviour of a model: fingerprint, numerics, KV layout, and short forwards that determine the rest."""
