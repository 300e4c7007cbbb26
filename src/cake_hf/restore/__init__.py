"""The restore of one prompt: hook, request, lookup, plan, the walk from both ends, saving."""
