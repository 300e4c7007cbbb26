"""`python -m demo`: one question about a long text, cold and warm, in processes of their own; then a race on a slow store."""
