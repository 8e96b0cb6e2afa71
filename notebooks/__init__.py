"""Notebooks for Colab, stored with their outputs; `python -m notebooks.run` executes them."""

from typing import Any

# The public repository. The notebooks hold the same address, in their badge and where they clone
# it; tests/docs/test_notebooks.py compares them. Who knows it replaces OWNER everywhere at once:
#   sed -i 's|OWNER/gpa-optax|the-owner/the-name|g' notebooks/*.py notebooks/*.ipynb
REPOSITORY = "https://github.com/OWNER/gpa-optax"

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
