"""From a benchmark's files to prompts: rows, where they come from, how they are worded, how they become tokens."""
