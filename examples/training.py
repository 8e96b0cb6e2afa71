"""The trainer: one for every model, optimizer and machine of the examples.

`train` is the whole program; `build` is what it compiles.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from examples import checkpoints, optimizers
from examples.optimizers import Recipe, Settings
from examples.reporting import Report
from examples.sharding import BATCH, MICROBATCHES, in_order, make_mesh, shardings

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Training:
    """The flags that every run has, whatever it trains. A workload adds its data and model."""

    steps: int = 1000
    """Updates."""
    batch_size: int = 40
    """Examples in an update, over all devices."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    seed: int = 0
    """Decides the initialization and the order of the data."""
    fsdp: int = 1
    """Devices that share one copy of params and optimizer state; the others repeat it."""
    evaluate_every: int = 50
    """Updates from one evaluation, and checkpoint, to the next."""
    evaluate_y: bool = False
    """Whether to evaluate y, the params that are trained, beside the averaged weights x."""
    validation_examples: int | None = 200
    """Held-out examples to evaluate on; None: all there are."""
    keep: int = 2
    """Checkpoints to keep, beside the best."""
    resume: bool = True
    """Go on with what is in the folder. --no-resume renames it and starts anew."""
    log_every: int = 10
    """Updates from one line of metrics to the next."""
    max_bad_steps: int = 10
    """Steps in a row with a loss or gradient that is no finite number, at which the run ends. A
    step like that changes neither the params nor the optimizer's state."""

    def __post_init__(self):
        counts = ("steps", "batch_size", "accumulate", "evaluate_every", "keep", "log_every")
        for name in (*counts, "max_bad_steps", "validation_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{optimizers.flag(name)} must be at least 1, got {value}.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--batch-size ({self.batch_size}) must be a multiple of --accumulate "
                f"({self.accumulate})."
            )


@dataclasses.dataclass(frozen=True)
class OneRun(Training):
    """The flags of a single run. `examples.compare` makes one of these for each optimizer."""

    run: Path | None = None
    """Folder of the run: checkpoints, metrics, summary. The same command goes on with what it
    finds there. Default: runs/ and a name made of the preset and the optimizer."""
    optimizer: optimizers.Name = "gpa-adamw"
    """The optimizer: a base, or a kind of averaging around it."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings()


def check_master_copy(param_dtype: str, optimizer: optimizers.Name) -> None:
    if param_dtype == "bfloat16" and not optimizers.holds_master_copy(optimizer):
        raise ValueError(
            f"--model.param-dtype bfloat16 needs an optimizer that holds a float32 copy of the "
            f"params, such as gpa-adamw; --optimizer {optimizer} holds none."
        )


class Task(NamedTuple):
    """A model and its loss."""

    new_model: Callable[[nnx.Rngs], nnx.Module]
    metrics: Callable[[nnx.Module, Batch, jax.Array | None], dict[str, jax.Array]]
    """Maps a model, a batch and a key for dropout (None: no dropout) to numbers for each example,
    among them its "loss"."""
    example: dict[str, jax.ShapeDtypeStruct]
    """Shapes and dtypes of one example."""
    unit: str
    """What throughput counts: tokens or images."""
    units: int
    """How many of them an example has."""


class Data(Protocol):
    """Where examples come from; see `examples.llama.data` and `examples.vit.data`."""

    description: str
    files: Mapping[str, Any]
    """What has to be stored with a run to use its weights, as JSON, by name of file."""

    def train(
        self, batch_size: int, seed: int, process_index: int, process_count: int, **how: Any
    ) -> grain.DatasetIterator:
        """The rows process_index, process_index + process_count, ... of each batch. The batches
        depend on `batch_size`, `seed` and `how` alone; the states of all processes, merged into one
        dict, are a state for each of any other number of processes."""

    def validation(
        self,
        count: int | None,
        batch_size: int,
        process_index: int,
        process_count: int,
        **how: Any,
    ) -> Any: ...


class State(NamedTuple):
    """All that an update changes, and all that a checkpoint holds beside the data's position."""

    step: jax.Array
    params: optax.Params
    opt_state: optax.OptState
    key: jax.Array


class End(NamedTuple):
    """How training ended."""

    done: int
    """Updates made in all."""
    stopped_by: signal.Signals | None
    """What stopped it before the last one, if anything did."""

    @property
    def status(self) -> int:
        """For the command to exit with. Who sends SIGTERM wants the run to end, and it did, with
        nothing lost; Ctrl-C is to end a script that goes on with something else, too."""
        return 130 if self.stopped_by == signal.SIGINT else 0


class Program(NamedTuple):
    """What is compiled for a run, and the shapes and places of what goes in and out."""

    mesh: Mesh
    recipe: Recipe
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
    part = config.batch_size // config.accumulate
    if part % mesh.size:
        raise ValueError(
            f"--batch-size / --accumulate must be a multiple of the {mesh.size} devices, got "
            f"{config.batch_size} / {config.accumulate}."
        )
    recipe = optimizers.recipe(config.optimizer, config.settings, config.steps)
    graph = nnx.graphdef(nnx.eval_shape(lambda: task.new_model(nnx.Rngs(0))))

    def initial() -> State:
        init_key, train_key = jax.random.split(jax.random.PRNGKey(config.seed))
        params = nnx.to_pure_dict(nnx.state(task.new_model(nnx.Rngs(init_key)), nnx.Param))
        return State(jnp.zeros((), jnp.int32), params, recipe.optimizer.init(params), train_key)

    def mean_loss(params: optax.Params, rows: Batch, key: jax.Array) -> jax.Array:
        return task.metrics(nnx.merge(graph, params), rows, key)["loss"].mean()

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), config.accumulate)
        loss, grads = accumulate(jax.value_and_grad(mean_loss), state.params, batch, keys)
        grad_norm = optax.tree.norm(grads)  # no finite number if any element is none
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
        updated = optax.apply_updates(state.params, updates), opt_state
        # A choice and no branch, whose two sides an H100's compiler keeps apart, in temporaries as
        # large as the model. optax.apply_if_finite is such a branch, reads all gradients once more,
        # does not look at the loss, and lets what is not finite pass when there was too much of it.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), updated, (state.params, state.opt_state)
        )
        metrics = {"loss": loss, "grad_norm": grad_norm, "good": good}
        return State(state.step + 1, params, opt_state, state.key), metrics

    def evaluate(params: optax.Params, batch: Batch) -> dict[str, jax.Array]:
        mask = batch["mask"]
        values = task.metrics(nnx.merge(graph, params), batch, None)
        return {name: jnp.sum(value * mask) for name, value in values.items()}

    abstract = jax.eval_shape(initial)
    places = shardings(abstract, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(
            (config.accumulate, part, *leaf.shape),
            leaf.dtype,
            sharding=NamedSharding(mesh, MICROBATCHES),
        )
        for name, leaf in task.example.items()
    }
    return Program(
        mesh,
        recipe,
        jax.jit(initial, out_shardings=places),
        jax.jit(step, donate_argnums=0, out_shardings=(places, None)),
        jax.jit(evaluate),
        jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            places,
        ),
        batch,
    )


def accumulate(value_and_grad: Callable, params: optax.Params, batch: Batch, keys: jax.Array):
    """Mean of the loss and the gradient over the parts of a batch, which lie along its first axis.

    Sums are float32, also of bfloat16 gradients.
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


def place(batch: Batch, mesh: Mesh, parts: int | None = None) -> Batch:
    """Brings this process's rows of a batch to its devices, for a train step in `parts` parts, or
    for an evaluation (None)."""

    def move(rows: np.ndarray) -> jax.Array:
        if parts is None:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), rows)
        rows = rows.reshape(parts, len(rows) // parts, *rows.shape[1:])
        if jax.process_count() > 1:
            return in_order(rows, mesh)
        return jax.make_array_from_process_local_data(NamedSharding(mesh, MICROBATCHES), rows)

    return {name: move(rows) for name, rows in batch.items()}


def train(config: OneRun, task: Task, data: Data, report: Report, **how: Any) -> End:
    """Trains from the start, or from the run's last checkpoint, to the last step or a signal.

    Args:
      config: the run.
      task: model and loss.
      data: training and validation examples.
      report: is told everything that is measured.
      how: passed on to `data`, such as the length of its sequences.

    Returns:
      The updates made in all, and the signal that stopped them, if one did.

    Raises:
      FloatingPointError: after --max-bad-steps steps in a row with a loss or gradient that is no
        finite number.
      OSError: if a checkpoint or a line of metrics could not be written.
      checkpoints.DamagedError: if the run has checkpoints and none can be restored.
    """
    mesh = make_mesh(config.fsdp)
    program = build(config, task, mesh)
    process = (jax.process_index(), jax.process_count())
    part = config.batch_size // config.accumulate
    batches = data.train(config.batch_size, config.seed, *process, **how)
    validation = data.validation(config.validation_examples, part, *process, **how)
    folder = config.run / "checkpoints"

    def say(line: str) -> None:
        report.console.print(f"{report.title}: {line}", highlight=False, soft_wrap=True)

    done = checkpoints.newest_good(folder, program.state, say)
    with (
        jax.set_mesh(mesh),
        contextlib.closing(batches),
        checkpoints.opened(folder, config.keep) as manager,
        stop_requests(manager) as stop,
    ):
        if done == config.steps:
            say(f"all {done} steps are done already.")
            return End(done, None)
        if done:
            state = checkpoints.restore(manager, done, program.state, batches)
        else:
            batches.start_prefetch()  # while the step compiles
            state = program.initial()
        step = program.step.lower(program.state, program.batch).compile()
        report.begin(done, state, step.memory_analysis())

        def evaluate() -> dict[str, dict[str, float]]:
            x = program.recipe.evaluated(state.opt_state, state.params)
            values = {"x": mean_metrics(program, x, validation)}
            if config.evaluate_y and x is not state.params:
                values["y"] = mean_metrics(program, state.params, validation)
            return values

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
                raise FloatingPointError(too_many_bad_steps(config, done, manager.latest_step()))
            if done % config.evaluate_every == 0 or done == config.steps:
                report.flush(done)  # so that evaluating is no part of a step's time
                values = evaluate()
                report.evaluated(done, values)  # before a checkpoint says that it need not be again
                checkpoints.save(manager, done, state, batches, values["x"]["loss"])
        report.flush(done)
        if done != manager.latest_step():
            checkpoints.save(manager, done, state, batches, loss=None)
        checkpoints.finish(manager)
    return End(done, stop.received)


def too_many_bad_steps(config: OneRun, done: int, last: int | None) -> str:
    kept = "There is no checkpoint yet"
    if last is not None:
        kept = f"The last checkpoint, {config.run / 'checkpoints' / str(last)}, is kept"
    return (
        f"By step {done}, {config.max_bad_steps} steps in a row had a loss or gradient that is no "
        f"finite number; they changed nothing. {kept}; --max-bad-steps allows more."
    )


def mean_metrics(program: Program, params: optax.Params, batches: Any) -> dict[str, float]:
    """Means over all validation examples."""
    totals: dict[str, Any] = {}
    for batch in batches:
        batch = place(batch, program.mesh)
        sums = {**program.evaluate(params, batch), "count": jnp.sum(batch["mask"])}
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    totals = {name: float(value) for name, value in totals.items()}
    count = totals.pop("count")
    return {name: value / count for name, value in totals.items()}


@dataclasses.dataclass
class Stop:
    """Whether to save and stop: after Ctrl-C or SIGTERM.

    With several processes only SIGTERM counts, and orbax makes them agree on the step.
    """

    manager: ocp.CheckpointManager
    received: signal.Signals | None = None
    """The one that asked for it."""

    def requested(self, done: int) -> bool:
        if jax.process_count() > 1 and self.manager.reached_preemption(done):
            self.received = signal.SIGTERM
        return self.received is not None

    def receive(self, number: int, frame: Any) -> None:
        """The handler. A second Ctrl-C interrupts at once; SIGTERM may come from several senders,
        and a second one changes nothing."""
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        if self.received is None:
            # Not print: what is interrupted may be printing.
            os.write(
                2, b"\nStopping after this step; Ctrl-C stops at once, without a checkpoint.\n"
            )
            self.received = signal.Signals(number)


@contextlib.contextmanager
def stop_requests(manager: ocp.CheckpointManager) -> Iterator[Stop]:
    stop = Stop(manager)
    if jax.process_count() > 1:
        yield stop
        return
    before = {
        number: signal.signal(number, stop.receive) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
