"""`python -m demo`: one question about a long text, cold and warm, in processes of their own; then a race on a slow store.

`play` reads from top to bottom; the other modules are its steps.
"""
