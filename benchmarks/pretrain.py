"""Trains the model that fine-tuning starts from, and stores its params beside the corpus.

python -m benchmarks.pretrain    # about two minutes of a core
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from benchmarks import corpus
from benchmarks.ensemble import TRACED, Member, program, structure
from benchmarks.workloads import PRETRAINED, Data

# AdamW as it was tuned for 4,000 steps, on a seed that nothing else has.
MEMBER = Member("adamw", 4000, 900, 8e-3, warmup=0.05)


def trained(member: Member, data: Data) -> optax.Params:
    """The params at the end of a run."""
    compiled = program(structure(member), together=False, at_y=False)
    numbers = {n: np.float32(member.settings[n]) for n in TRACED if n in member.settings}
    state = compiled.initial(np.uint32(member.seed), numbers, data.start)
    rows = member.workload.rows(data.train, member.seed, member.steps)
    params, _ = compiled.advance(state, numbers, rows, jax.tree.map(jnp.asarray, data.train))
    return params


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, default=corpus.FOLDER, help="of the corpus")
    folder = parser.parse_args().folder
    params = trained(MEMBER, MEMBER.workload.load(folder))
    np.savez(folder / PRETRAINED, **traverse_util.flatten_dict(params, sep="/"))
    print(f"Written: {folder / PRETRAINED}.")


if __name__ == "__main__":
    main()
