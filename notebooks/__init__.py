"""Notebooks, stored with their outputs; `python -m notebooks.run` executes them."""

from typing import Any

# What the short form computes: values for the variables of the cell that is tagged `parameters`.
SHORT: dict[str, dict[str, Any]] = {
    "quickstart": {"steps": 20, "seeds": 1},
    "llama": {"steps": 20, "evaluate_every": 10},
    "vit": {
        "seeds": 1,
        "small_batches": {"batch_size": 32, "steps": 4, "evaluate_every": 2},
        "large_batches": {"batch_size": 128, "steps": 4, "evaluate_every": 2},
    },
    "averaging": {"steps": 20, "seeds": 1},
}
