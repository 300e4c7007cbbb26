"""Restores on a virtual clock, by the library's own decisions: the simulator, and what `simulate` prints of it."""
