"""What the codecs cost and save, on KV that a real model made of real text."""
