"""One chunk of KV: its layout, its safetensors file, its bytes in memory."""
