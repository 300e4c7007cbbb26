"""Restores on a virtual clock, by the library's own decisions: the simulator, and the output of `simulate`."""
