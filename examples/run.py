"""One training run, from the command line to its summary."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from examples import optimizers, reporting
from examples.command_line import begin_anew, check_run, given, parse, peek, to_store
from examples.reporting import History, Report, read_json
from examples.training import Data, End, OneRun, train


def train_command(kind: type, program: str, arguments: Sequence[str], console: Console) -> int:
    """Parses the flags of a workload, trains, and shows what came of it."""
    config = parse_run(kind, program, arguments)
    config.distributed.start()
    console.quiet = jax.process_index() > 0
    if not config.resume:
        begin_anew(config.run, console)
    end = run(config, console)
    runs = {optimizers.label(config.optimizer): History.read(config.run)}
    if jax.process_index() == 0 and all(history.validation for history in runs.values()):
        reporting.plot(runs, config.run / "summary.png")
        console.print(reporting.table(runs, config.steps))
    console.print(
        f"Curves: {config.run}/summary.png. Numbers: {config.run}/metrics.jsonl.",
        highlight=False,
        soft_wrap=True,
    )
    if end.done < config.steps:
        console.print(reporting.stopped(end.done, config.resume))
        return end.status
    return 0


def parse_run(kind: type, program: str, arguments: Sequence[str]) -> OneRun:
    """The preset and the optimizer decide the defaults that `--help` shows for the other flags."""
    default = kind()
    preset = peek(arguments, "--preset", default.preset)
    optimizer = peek(arguments, "--optimizer", default.optimizer)
    if preset in kind.PRESETS and optimizer in optimizers.NAMES:  # else tyro names the error
        default = kind(
            optimizer=optimizer,
            settings=kind.preset_settings(preset, optimizer),
            **kind.preset_values(preset),
        )
    config = parse(kind, program, default, arguments)
    optimizers.check_effect(config.optimizer, config.settings, given(arguments))
    if config.evaluate_y and not optimizers.averages(config.optimizer):
        raise ValueError(
            f"--evaluate-y has no effect with {config.optimizer}, whose params are all there is to "
            "evaluate: leave it out."
        )
    if config.run is None:
        folder = Path("runs", f"{config.workload}-{config.preset}-{config.optimizer}")
        config = dataclasses.replace(config, run=folder)
    return config


def run(config: OneRun, console: Console, data: Data | None = None) -> End:
    """Trains, or goes on with the run in `config.run`; what it measures is in its folder.

    Args:
      config: a workload's configuration of one run.
      console: shows the progress.
      data: the opened data, if there is any already.

    Returns:
      The updates made in all, and what stopped them.

    Raises:
      ValueError: if flags or data do not fit, before anything is compiled.
      Exception: what `train` raises.
    """
    if data is None:
        with console.status("Opening the data"):
            data = config.open_data()
        console.print(data.description, highlight=False, soft_wrap=True)
    config = config.fitted(data)
    check_run(config)
    check_files(config.run, data.files)
    task = config.task()
    report = Report(
        config.run,
        console,
        title=optimizers.label(config.optimizer),
        steps=config.steps,
        log_every=config.log_every,
        unit=task.unit,
        units_per_step=task.units * config.batch_size,
        learning_rate=optimizers.schedule(config.settings, config.steps),
        files={"config.json": to_store(config), **data.files},
    )
    try:
        return train(config, task, data, report, **config.data_options)
    finally:
        report.close()


def check_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Checks that the data still is what the run was begun with: its tokenizer, its classes.

    Raises:
      ValueError: if it has changed since.
    """
    for name, content in files.items():
        path = folder / name
        if path.exists() and read_json(path) != content:
            raise ValueError(
                f"{folder} holds a run that was begun with other data, as its {name} shows; give "
                "that data to go on with it, another --run, or --no-resume to rename it and start "
                "anew."
            )
