"""What the lossless codec costs and saves, on KV that a real model made of real text."""
