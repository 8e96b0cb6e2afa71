"""One training loop for every model and optimizer of the examples."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from examples.optimizers import Recipe

Loss = Callable[[nnx.Module, Any], jax.Array]


@dataclasses.dataclass
class Run:
    """What a training run has measured so far, and where it stands."""

    steps: int
    """Updates that were asked for."""
    done: int = 0
    """Updates made."""
    train_loss: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """(step, mean loss at y since the last entry)."""
    validation_loss: dict[str, list[tuple[int, float]]] = dataclasses.field(default_factory=dict)
    """(step, validation loss) for each set of weights that the optimizer offers."""
    seconds_per_step: float = float("nan")
    """Median time of an update, evaluation and compilation apart."""
    optimizer_bytes: int = 0
    """Size of the optimizer's state."""
    step_bytes: int = 0
    """Peak memory of the compiled step: arguments, results and temporaries."""
    weights: optax.Params = None
    """The best candidate of the last evaluation."""


def train(
    model: nnx.Module,
    loss: Loss,
    recipe: Recipe,
    batches: Iterator[np.ndarray],
    validation: np.ndarray,
    run: Run,
    evaluate_every: int,
    report: Callable[[Run], None] = lambda run: None,
) -> None:
    """Trains for `run.steps` updates, and fills `run` as it goes: an interrupt loses nothing.

    Args:
      model: the model; it is left as it was.
      loss: mean loss of a model on a batch.
      recipe: the optimizer and the weights that it offers for evaluation.
      batches: the training batches.
      validation: batches to evaluate on, stacked.
      run: is filled in.
      evaluate_every: evaluate after so many updates, and at both ends.
      report: called after each update.
    """
    graph, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(lambda p: p.copy(), params)  # the step donates them
    opt_state = recipe.optimizer.init(params)
    run.optimizer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))

    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p), batch))(params)
        updates, opt_state = recipe.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    @jax.jit
    def evaluate(params, batches):
        return jax.lax.map(lambda batch: loss(nnx.merge(graph, params), batch), batches).mean()

    def evaluate_candidates():
        candidates = recipe.candidates(opt_state, params)
        for name, weights in candidates.items():
            losses = run.validation_loss.setdefault(name, [])
            losses.append((run.done, float(evaluate(weights, validation))))
        *_, best = candidates.values()
        run.weights = jax.tree.map(lambda w: w.copy(), best)  # the next step donates the arrays

    batch = next(batches)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, batch).compile()
    if (memory := compiled.memory_analysis()) is not None:
        run.step_bytes = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )

    evaluate_candidates()
    seconds, values = [], []
    while run.done < run.steps:
        start = time.perf_counter()
        params, opt_state, value = compiled(params, opt_state, batch)
        batch = next(batches)  # while the device works
        values.append(float(value))
        seconds.append(time.perf_counter() - start)
        run.done += 1
        run.seconds_per_step = float(np.median(seconds))
        if run.done % evaluate_every == 0 or run.done == run.steps:
            run.train_loss.append((run.done, float(np.mean(values))))
            values.clear()
            evaluate_candidates()
        report(run)
