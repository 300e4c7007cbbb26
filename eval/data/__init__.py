"""From a benchmark's files to prompts: the rows, their sources, their wording, and their tokens."""
