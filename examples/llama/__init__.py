"""A small Llama on text."""
