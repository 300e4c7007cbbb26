"""What a model is and does: fingerprint, numerics, layout of its KV, and short forwards that find out the rest."""
