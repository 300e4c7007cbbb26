"""Floor 0: decisions and facts in plain Python (errors, keys, frontier, limits, report). The standard library only."""
