"""The scores in the form of the `evaluate` library; see `longbench.py`."""
