"""Which chunks to compute and which to load: the frontier, the costs it decides by, and how costs are learnt. No torch."""
