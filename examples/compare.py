"""Trains the same model with several optimizers and reports which needs fewer steps.

python -m examples.compare llama
python -m examples.compare llama --steps 200 --gpa-adamw.learning-rate 8e-3
python -m examples.compare vit --optimizers adamw gpa-adamw schedule-free-adamw diloco-adamw
"""

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from examples import plots
from examples.commands import connect, ended, open_data, run_command, start_or_resume
from examples.config import OneRun, Training, decisive, given, peek, to_json
from examples.console import say
from examples.files import write_json
from examples.llama.config import LlamaFlags, TrainLlama
from examples.metrics import History
from examples.plots import first_step_at
from examples.run_folder import check_run, start_over, to_store
from examples.settings import NAMES, Name, Settings, averages, check_effect, label
from examples.vit.config import TrainViT, ViTFlags


@dataclasses.dataclass(frozen=True)
class Comparison(Training):
    """The flags that a comparison adds to its workload's."""

    evaluate_y: bool = True
    """Whether to evaluate y, the params that are trained, beside the averaged weights x."""
    out: Path | None = None
    """Folder of the comparison. Default: runs/ and a name made of the flags, so that the same
    command resumes what it finds there."""
    optimizers: tuple[Name, ...] = ("adamw", "gpa-adamw")
    """Which optimizers to run, in this order. The first is the baseline."""
    settings: Annotated[dict[str, Settings], tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=dict
    )

    def of(self, kind: type, optimizer: Name) -> OneRun:
        """The run of one optimizer."""
        shared = {f.name for f in dataclasses.fields(kind)} & {
            f.name for f in dataclasses.fields(self)
        }
        values = {name: getattr(self, name) for name in shared - {"settings"}}
        return kind(
            run=self.out / optimizer,
            optimizer=optimizer,
            settings=self.settings[optimizer],
            **values,
        )


@dataclasses.dataclass(frozen=True)
class CompareLlama(Comparison, LlamaFlags):
    """Trains a small Llama with several optimizers on the same batches and from the same
    initialization, and compares them."""


@dataclasses.dataclass(frozen=True)
class CompareViT(Comparison, ViTFlags):
    """Trains a ViT with several optimizers on the same batches and from the same initialization,
    and compares them."""


WORKLOADS = {"llama": (CompareLlama, TrainLlama), "vit": (CompareViT, TrainViT)}


def main(arguments: Sequence[str], console: Console) -> int:
    if not arguments or arguments[0] not in WORKLOADS:
        given = f", got {arguments[0]}" if arguments and not arguments[0].startswith("-") else ""
        raise ValueError(
            f"Say what to train: python -m examples.compare llama, or vit{given}. "
            "With --help after it, that lists every flag."
        )
    workload, *arguments = arguments
    config = parse_comparison(workload, arguments)
    connect(config.distributed)
    console.quiet = jax.process_index() > 0
    data = open_data(config, arguments, console)
    if not config.resume:
        start_over(config.out, console)
    configs = {name: config.of(WORKLOADS[workload][1], name) for name in config.optimizers}
    for one in configs.values():  # all of them, before the first one trains
        check_run(one.fitted(data))
    say(console, data.description)
    say(
        console,
        f"{config.steps} steps of {config.batch_size} examples on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}, stored in {config.out}",
    )
    for name in config.optimizers:
        end = start_or_resume(configs[name], console, data)
        if end.done < config.steps:
            break
    if jax.process_index() > 0:
        return 0
    histories = {name: History.read(configs[name].run) for name in config.optimizers}
    histories = {name: history for name, history in histories.items() if history.validation}
    complete = [name for name, history in histories.items() if history.done == config.steps]
    if histories:
        show(config, histories, console)
    if workload == "llama" and complete and jax.process_count() == 1:
        show_sample(configs[complete[-1]], console)
    if histories:
        say(console, f"Numbers: {config.out}/compare.json. Curves: {config.out}/compare.png.")
    return ended(config, end, console)


def parse_comparison(workload: str, arguments: Sequence[str]) -> Any:
    """Parses the flags, whose defaults, as `--help` shows them, depend on the preset and the
    optimizers."""
    kind, train = WORKLOADS[workload]
    default = kind()
    preset = peek(arguments, "--preset", default.preset)
    names = named_optimizers(arguments) or default.optimizers
    if preset in train.PRESETS and set(names) <= set(NAMES):  # else tyro names the error
        default = kind(
            optimizers=tuple(names),
            settings={name: train.preset_settings(preset, name) for name in names},
            **train.preset_values(preset),
        )
    program = f"python -m examples.compare {workload}"
    config = tyro.cli(kind, prog=program, default=default, args=arguments)
    if not config.optimizers or len(set(config.optimizers)) < len(config.optimizers):
        raise ValueError("--optimizers must name one or more different optimizers.")
    for name, settings in config.settings.items():
        check_effect(name, settings, given(arguments), prefix=f"--{name}.")
    if "--evaluate-y" in given(arguments) and not any(map(averages, config.optimizers)):
        raise ValueError(
            "--evaluate-y has no effect without an optimizer that averages: leave it out, or name "
            "one in --optimizers."
        )
    if config.out is None:
        flags = decisive(to_json(config)) | {
            "evaluations": [config.evaluate_every, config.evaluate_y]
        }
        digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()
        folder = f"compare-{workload}-{digest[:8]}"
        config = dataclasses.replace(config, out=Path("runs", folder))
    return config


def named_optimizers(arguments: Sequence[str]) -> list[str]:
    """What follows `--optimizers`, before the other flags can be parsed."""
    names: list[str] = []
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--optimizers":
            rest = [value] if value else arguments[index + 1 :]
            names = list(itertools.takewhile(lambda name: not name.startswith("-"), rest))
    return names


def show(config: Any, histories: Mapping[str, History], console: Console) -> None:
    """Prints the table and the verdict; writes compare.json and compare.png."""
    labels = {label(name): history for name, history in histories.items()}
    baseline = label(config.optimizers[0])
    console.print(plots.results_table(labels, config.steps, baseline))
    for line in verdicts(labels, config.steps, baseline):
        console.print(line, highlight=False)
    plots.plot(labels, config.out / "compare.png", baseline)
    results = {
        **to_store(config),
        "baseline": baseline,
        "runs": {name: dataclasses.asdict(history) for name, history in labels.items()},
    }
    write_json(config.out / "compare.json", results)


def verdicts(runs: Mapping[str, History], steps: int, baseline: str) -> list[str]:
    """For each complete run, whether and when it reached the first one's final loss."""
    complete = {name: run for name, run in runs.items() if run.done == steps}
    if baseline not in complete or len(complete) < 2:
        return [f"No comparison: it needs complete runs of {baseline} and of another optimizer."]
    goal = complete.pop(baseline).last()["loss"]
    lines = []
    for name, history in complete.items():
        step, end = first_step_at(history.losses(), goal), history.last()["loss"]
        lines.append(
            f"{name} did not reach {baseline}'s final loss: {end:.4f} against {goal:.4f} after "
            f"{steps} steps."
            if step is None
            else f"{name} reached {baseline}'s final loss ({goal:.4f}) at step {step} of {steps}, "
            f"{1 - step / steps:.0%} fewer steps, and ended at {end:.4f}."
        )
    return [*lines, "One seed: runs of one optimizer differ as well."]


def show_sample(config: OneRun, console: Console) -> None:
    """Prints text sampled from the weights at which the optimizer's run is evaluated."""
    from examples.llama.runs import load
    from examples.llama.sampling import generate

    _, model, tokenizer = load(config.run)
    text = generate(model, tokenizer, "def ", tokens=100, window=config.length, seed=config.seed)
    title = f"Sampled from the model that {label(config.optimizer)} trained"
    console.print(Panel(Text(text), title=title))


if __name__ == "__main__":
    sys.exit(run_command(main))
