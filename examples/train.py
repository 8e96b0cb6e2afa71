"""The training program: `build` defines what is compiled, `train` is the loop around it.

It serves every model, optimizer and machine of the examples; README.md has a map of the files.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from examples import checkpoints
from examples.config import OneRun
from examples.metrics import Report
from examples.optimizers import Optimizer, named_optimizer
from examples.sharding import batch_shapes, place, placed
from examples.stopping import End, stop_requests
from examples.workload import Batch, Data, Task


class State(NamedTuple):
    """All that an update changes, and all that a checkpoint holds besides the data's position."""

    step: jax.Array
    params: optax.Params
    opt_state: optax.OptState
    key: jax.Array


class Program(NamedTuple):
    """What is compiled for a run, and the shapes and shardings of its inputs and outputs."""

    mesh: Mesh
    optimizer: Optimizer
    initial: Callable[[], State]
    step: Any
    evaluate: Any
    state: State
    batch: Batch


def build(config: OneRun, task: Task, mesh: Mesh) -> Program:
    """Defines the jitted functions of a run; nothing is computed or compiled yet.

    Raises:
      ValueError: if the devices cannot share the batch evenly.
    """
    optimizer = named_optimizer(config.optimizer, config.settings, config.steps)
    graph = nnx.graphdef(nnx.eval_shape(lambda: task.new_model(nnx.Rngs(0))))

    def initial() -> State:
        init_key, train_key = jax.random.split(jax.random.PRNGKey(config.seed))
        params = nnx.to_pure_dict(nnx.state(task.new_model(nnx.Rngs(init_key)), nnx.Param))
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), train_key)

    def mean_loss(params: optax.Params, rows: Batch, key: jax.Array) -> jax.Array:
        return task.metrics(nnx.merge(graph, params), rows, key)["loss"].mean()

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), config.accumulate)
        loss, grads = accumulate(jax.value_and_grad(mean_loss), state.params, batch, keys)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = optax.apply_updates(state.params, updates), opt_state
        # A non-finite step changes nothing. Select with `where`, not `cond` (which is in
        # optax.apply_if_finite, too): on an H100 a cond keeps temporaries of the model's size.
        grad_norm = optax.tree.norm(grads)  # not finite if any element is not
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), updated, (state.params, state.opt_state)
        )
        metrics = {"loss": loss, "grad_norm": grad_norm, "good": good}
        return State(state.step + 1, params, opt_state, state.key), metrics

    def evaluate(params: optax.Params, batch: Batch) -> dict[str, jax.Array]:
        values = task.metrics(nnx.merge(graph, params), batch, None) | {"count": 1.0}
        return {name: jnp.sum(value * batch["mask"]) for name, value in values.items()}

    state = placed(jax.eval_shape(initial), mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return Program(
        mesh,
        optimizer,
        jax.jit(initial, out_shardings=places),
        jax.jit(step, donate_argnums=0, out_shardings=(places, None)),
        jax.jit(evaluate),
        state,
        batch_shapes(task.example, config.batch_size, config.accumulate, mesh),
    )


def accumulate(value_and_grad: Callable, params: optax.Params, batch: Batch, keys: jax.Array):
    """Mean of the loss and the gradient over the parts of a batch, which lie along its first axis.

    Sums are in float32, even those of bfloat16 gradients.
    """
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    if len(keys) == 1:
        return value_and_grad(params, first, keys[0])

    def add(sums, part):
        return jax.tree.map(lambda a, b: a + b, sums, value_and_grad(params, *part)), None

    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)),
        jax.eval_shape(value_and_grad, params, first, keys[0]),
    )
    sums, _ = jax.lax.scan(add, zeros, (batch, keys))
    return jax.tree.map(lambda leaf: leaf / len(keys), sums)


def train(config: OneRun, task: Task, data: Data, mesh: Mesh, report: Report, **how: Any) -> End:
    """Trains from the start, or from the run's last checkpoint, to the last step or a signal.

    Args:
      config: the run.
      task: model and loss.
      data: training and validation examples.
      mesh: the devices; see `sharding.make_mesh`.
      report: receives everything that is measured.
      how: passed on to `data`, such as the length of its sequences.

    Raises:
      FloatingPointError: after --max-bad-steps non-finite steps in a row.
      OSError: if a checkpoint or a line of metrics could not be written.
      checkpoints.DamagedError: if the run has checkpoints and none can be restored.
    """
    program = build(config, task, mesh)
    process = (jax.process_index(), jax.process_count())
    batches = data.train(config.batch_size, config.seed, *process, **how)
    part = config.batch_size // config.accumulate
    validation = data.validation(config.validation_examples, part, *process, **how)
    folder = config.run / "checkpoints"
    done = checkpoints.newest_good(folder, program.state, report.say)
    if done == config.steps:
        report.say(f"all {done} steps are done already.")
        return End(done, None)

    def evaluate() -> dict[str, dict[str, float]]:
        x = program.optimizer.eval_params(state.opt_state, state.params)
        values = {"x": mean_metrics(program, x, validation)}
        if config.evaluate_y and x is not state.params:
            values["y"] = mean_metrics(program, state.params, validation)
        return values

    with (
        jax.set_mesh(mesh),
        contextlib.closing(batches),
        checkpoints.opened(folder, config.keep) as manager,
        stop_requests(manager) as stop,
    ):
        if done:
            state = checkpoints.restore(manager, done, program.state, batches)
        else:
            batches.start_prefetch()  # while the step compiles
            state = program.initial()
        step = program.step.lower(program.state, program.batch).compile()
        report.begin(done, state, step.memory_analysis())
        if not done:
            report.evaluated(0, evaluate())
        while done < config.steps and not stop.requested(done):
            start = time.perf_counter()
            batch = place(next(batches), mesh, config.accumulate)
            waited = time.perf_counter() - start
            state, metrics = step(state, batch)
            done += 1
            report.stepped(done, metrics, waited)
            if report.worst_row >= config.max_bad_steps:
                checkpoints.finish(manager)
                raise FloatingPointError(
                    f"By step {done}, {config.max_bad_steps} steps in a row had a loss or gradient "
                    f"that is not finite; they changed nothing. {checkpoints.kept(manager)}; "
                    "--max-bad-steps allows more."
                )
            if done % config.evaluate_every == 0 or done == config.steps:
                report.flush(done)  # so that evaluating is no part of a step's time
                values = evaluate()
                report.evaluated(done, values)  # first: after the checkpoint it is not repeated
                checkpoints.save(manager, done, state, batches, values["x"]["loss"])
        report.flush(done)
        if done != manager.latest_step():
            checkpoints.save(manager, done, state, batches, loss=None)
        checkpoints.finish(manager)
    return End(done, stop.received)


def mean_metrics(program: Program, params: optax.Params, batches: Any) -> dict[str, float]:
    """Means over all validation examples."""
    totals: dict[str, Any] = {}
    for batch in batches:
        sums = program.evaluate(params, place(batch, program.mesh))
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    totals = {name: float(value) for name, value in totals.items()}
    count = totals.pop("count")
    return {name: value / count for name, value in totals.items()}
