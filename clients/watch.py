"""Looks on while a library trains that keeps its optimizer's state to itself."""

import itertools

import jax
import numpy as np
import optax

from gpa_optax import check_step


def watched(optimizer, seen):
    """`optimizer`, which appends to `seen` what each update is given: the state and the params
    after the step before, as the library left them."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **extra_args):
        jax.debug.callback(
            lambda *now: seen.append(jax.tree.map(np.array, now)), state, params, ordered=True
        )
        return optimizer.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def check_steps(seen, start):
    """`check_step` of all steps from `start` on, in which the learning rate is not 0."""
    jax.effects_barrier()
    assert len(seen) > start + 10
    for before, after in itertools.pairwise(seen[start:]):
        check_step(before, after)
