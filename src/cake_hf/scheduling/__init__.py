"""Who computes and who loads which chunk: the frontier, the costs it decides by, and how these are learnt. No torch."""
