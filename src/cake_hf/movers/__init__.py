"""Floor 3: the background threads that read chunks into place and write new chunks behind."""
