"""The restore of one prompt: hook, request, prefix match, plan, the walk from both ends, saving."""
