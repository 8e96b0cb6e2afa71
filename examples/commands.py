"""One run from its command to its summary; errors in a sentence; exit statuses."""

import ctypes
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import absl.logging
import jax
from rich.console import Console

from examples import optimizers, plots
from examples.config import Distributed, OneRun, given, parse_run
from examples.console import say
from examples.metrics import History, Report
from examples.run_folder import check_data, check_run, start_over, to_store
from examples.settings import label
from examples.sharding import make_mesh
from examples.stopping import End
from examples.train import train
from examples.workload import Data

# Orbax would warn of each checkpoint that is saved between two evaluations, and show the whole
# traceback of an error in its threads, which it raises as well.
absl.logging.set_verbosity(absl.logging.FATAL)

HEARTBEAT_SECONDS = 25  # of silence, after which a process of a distributed run is taken for gone
# How XLA's errors begin. Some calls of JAX raise a ValueError for a failed collective.
XLA_STATUS = re.compile(r"[A-Z_]+: ")
Command = Callable[[Sequence[str], Console], int]


def workload_command(kind: type, program: str, others: Mapping[str, Command]) -> Command:
    """A workload's command: it trains, unless its first argument is the name of one of `others`."""

    def command(arguments: Sequence[str], console: Console) -> int:
        name, *rest = arguments or ("--",)
        if name in others:
            return others[name](rest, console)
        if not name.startswith("-"):
            raise ValueError(
                f"There is no command {name}: give {' or '.join(others)}, or none to train, as in "
                f"{program} --steps 100."
            )
        return train_command(kind, program, arguments, console)

    return command


def train_command(kind: type, program: str, arguments: Sequence[str], console: Console) -> int:
    """Parses the flags of a workload, trains, and shows what came of it."""
    config = parse_run(kind, program, arguments)
    connect(config.distributed)
    console.quiet = jax.process_index() > 0
    data = open_data(config, arguments, console)
    if not config.resume:
        start_over(config.run, console)
    say(console, data.description)
    end = start_or_resume(config, console, data)
    runs = {label(config.optimizer): History.read(config.run)}
    if jax.process_index() == 0 and all(history.validation for history in runs.values()):
        plots.plot(runs, config.run / "summary.png")
        console.print(plots.results_table(runs, config.steps))
    say(console, f"Curves: {config.run}/summary.png. Numbers: {config.run}/metrics.jsonl.")
    return ended(config, end, console)


def ended(config: OneRun, end: End, console: Console) -> int:
    """The exit status; says how to resume."""
    if end.done == config.steps:
        return 0
    how = "the same command" if config.resume else "the same command without --no-resume"
    say(console, f"Stopped after step {end.done}; {how} resumes from there.")
    return end.status


def open_data(config: Any, arguments: Sequence[str], console: Console) -> Any:
    """Opens the data of a workload's configuration.

    Raises:
      ValueError: if it cannot be used, if a flag among the arguments has no effect on it, or if it
        decides what a flag of the model says otherwise.
    """
    with console.status("Opening the data"):
        data = config.open_data()
    for name in sorted(given(arguments) & data.without_effect.keys()):
        value = getattr(config.data, name.removeprefix("--data.").replace("-", "_"))
        raise ValueError(
            f"{name} {value} has no effect with {data.without_effect[name]}: leave it out."
        )
    fitted = config.fitted(data)
    for name in sorted(given(arguments)):
        field = name.removeprefix("--model.").replace("-", "_")
        value, other = (getattr(one.model, field, None) for one in (config, fitted))
        if value != other and name.startswith("--model."):
            raise ValueError(
                f"{name} {value} is not what --preset {config.preset} has for this data, {other}: "
                "leave it out, or give another number."
            )
    return data


def start_or_resume(config: OneRun, console: Console, data: Data) -> End:
    """Trains, or resumes the run in `config.run`; what it measures is in its folder.

    Args:
      config: a workload's configuration of one run.
      console: shows the progress.
      data: the opened data.

    Returns:
      The updates made in all, and what stopped them.

    Raises:
      ValueError: if flags or data do not fit, before anything is compiled.
      Exception: what `train` raises.
    """
    config = config.fitted(data)
    check_run(config)
    check_data(config.run, data.files)
    task, mesh = config.task(), make_mesh(config.fsdp)
    report = Report(
        config.run,
        console,
        title=label(config.optimizer),
        steps=config.steps,
        log_every=config.log_every,
        unit=task.unit,
        units_per_step=task.units * config.batch_size,
        learning_rate=optimizers.schedule(config.settings, config.steps),
        files={"config.json": to_store(config), **data.files},
    )
    try:
        return train(config, task, data, mesh, report, **config.data_options)
    finally:
        report.close()


def run_command(command: Command, arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status. An error that the user can fix is reported in one
    sentence, with status 2, and so are non-finite numbers, with status 3."""
    console = Console()
    keep_memory()
    try:
        return command(sys.argv[1:] if arguments is None else list(arguments), console)
    except (ValueError, OSError, FloatingPointError) as error:
        told, status = str(error), 3 if isinstance(error, FloatingPointError) else 2
        if jax.distributed.is_initialized():
            told = f"Process {jax.process_index()}: {told}"
            if XLA_STATUS.match(str(error)):
                told, status = f"{told} Another process of the run may have ended.", 1
        # Not the command's console, which is quiet in all processes but one.
        say(Console(stderr=True, style="red"), told)
    except KeyboardInterrupt:
        console.print("\nInterrupted.")
        status = 130
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if jax.distributed.is_initialized():
        # At a normal exit JAX would wait for the other processes, which wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def connect(flags: Distributed) -> None:
    """Joins the processes; must be called before anything else touches jax's devices.

    When a process is gone, JAX ends the others after `HEARTBEAT_SECONDS`.

    Raises:
      ValueError: if flags contradict each other or the processes do not meet.
    """
    who = [value is not None for value in (flags.coordinator, flags.processes, flags.process)]
    if not flags.distributed:
        if any(who):
            raise ValueError("--coordinator, --processes and --process need --distributed.")
        return
    if any(who) and not all(who):
        raise ValueError("Give --coordinator, --processes and --process together, or none.")
    try:
        jax.distributed.initialize(
            flags.coordinator,
            flags.processes,
            flags.process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--distributed: {error}") from error


def keep_memory() -> None:
    """Makes the allocator keep the memory of a step for the next one.

    By default glibc returns large blocks to the system, which clears them when they are next used.
    `python -m benchmarks.train_step` with and without --keep-memory shows what that costs.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-8, 1)  # M_ARENA_MAX: the limits below are those of the one arena
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-2, 2**26)  # M_TOP_PAD, in bytes
