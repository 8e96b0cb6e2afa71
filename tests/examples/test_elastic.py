"""A run moves between devices and processes, and when one of its processes goes, the others end."""

import dataclasses
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers.needs import TRAINER, needs

needs(*TRAINER)

from examples.config import Distributed, to_json
from examples.llama.data import TextData
from examples.metrics import History
from examples.settings import Settings
from examples.vit.config import TrainViT
from examples.vit.model import ViTConfig
from helpers import ROOT, environment
from helpers.programs import free_port, llama, on_devices, train

pytestmark = pytest.mark.processes

STEPS, PART = 16, 4
# (processes, devices of each, devices that share a copy of the state)
PLACES = {
    "1 device": (1, 1, 1), "2 devices": (1, 2, 1), "8 devices": (1, 8, 4), "2 processes": (2, 1, 2),
}  # fmt: skip
# Not AdamW at its learning rate, which makes of a difference in the last digit a large one: where a
# gradient is nearly zero its sign decides the update. Here the losses are compared, not the digits
# of a chaotic trajectory.
SETTINGS = Settings(learning_rate=0.02, b1=0.9, mu_x=0.9, mu_y=0.7, schedule="constant")


def text_run(folder):
    text = TextData(str(folder / "text"), shuffle=16, cache=folder / "cache")
    settings = dataclasses.asdict(SETTINGS)
    return llama(
        folder, optimizer="gpa-sgd", settings=settings, batch_size=16, accumulate=2, data=text,
        steps=STEPS, evaluate_every=PART, keep=10,
    )  # fmt: skip


def image_run(folder):
    """With dropout, so that each row has to be at its place in the batch: in the order in which two
    processes have the rows, the losses would differ by 2 %."""
    settings = dataclasses.replace(SETTINGS, learning_rate=0.1)
    return TrainViT(
        run=folder / "run", optimizer="gpa-sgd", settings=settings, batch_size=16, accumulate=2,
        model=ViTConfig(dim=16, layers=1, heads=2, hidden=32, patch=4, dropout=0.3),
        validation_examples=40, steps=STEPS, evaluate_every=PART, keep=10, log_every=1,
    )  # fmt: skip


RUNS = {"text": text_run, "images": image_run}
# `text_run` as people type it.
FLAGS = [
    "--optimizer", "gpa-sgd", "--learning-rate", "0.02", "--warmup", "0.05", "--b1", "0.9",
    "--schedule", "constant", "--average", "annealed", "--mu-x", "0.9", "--mu-y", "0.7",
    "--batch-size", "16", "--accumulate", "2", "--length", "16", "--steps", STEPS,
    "--evaluate-every", PART, "--keep", "10", "--log-every", "1", "--validation-examples", "16",
    "--model.vocab-size", "300", "--model.dim", "16", "--model.hidden", "32",
    "--model.unroll", "1", "--data.shuffle", "16",
]  # fmt: skip
# What the commands do with their flags, for a stored configuration.
PROGRAM = """
import json, sys
from examples import commands
from examples.commands import connect, run_command, start_or_resume
from examples.config import from_json
from examples.llama.config import TrainLlama
from examples.vit.config import TrainViT

def main(arguments, console):
    kind = {"llama": TrainLlama, "vit": TrainViT}[arguments[0]]
    config = from_json(kind, json.loads(arguments[1]))
    commands.HEARTBEAT_SECONDS = {heartbeat}
    connect(config.distributed)
    {first}
    return start_or_resume(config, console, config.open_data()).status

sys.exit(run_command(main))
"""


def start(config, count, devices=1, first="", heartbeat=25):
    """Starts the run in so many processes; `first` is what each does before, and `heartbeat` the
    seconds of silence after which the others take one for gone."""
    address = f"127.0.0.1:{free_port()}"
    program = PROGRAM.replace("{first}", first).replace("{heartbeat}", f"{heartbeat}")
    running = []
    for process in range(count):
        distributed = Distributed(True, address, count, process)
        stored = json.dumps(to_json(dataclasses.replace(config, distributed=distributed)))
        running.append(python(devices, "-c", program, config.workload, stored))
    return running


def typed(config, count):
    """Starts `text_run` in so many processes, by its command line."""
    flags = [
        *FLAGS, "--run", config.run, "--data.source", config.data.source,
        "--data.cache", config.data.cache, "--fsdp", config.fsdp,
        "--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", count,
    ]  # fmt: skip
    return [python(1, "-m", "examples.llama", *flags, "--process", n) for n in range(count)]


def python(devices, *arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, text=True, env=environment(devices),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def train_at(config, place, monkeypatch, done=0):
    """Trains to the end at a place, from the checkpoint of step `done`."""
    processes, devices, fsdp = PLACES[place]
    config = dataclasses.replace(config, fsdp=fsdp)
    if processes == 1:
        with on_devices(devices, monkeypatch):
            assert_resumes_from(done, train(config))
        return
    text = config.workload == "llama"
    running = typed(config, processes) if text else start(config, processes, devices)
    outputs = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0] * processes, outputs
    assert_resumes_from(done, outputs[0][0])
    assert not any("step" in output for output, _ in outputs[1:]), "only one of them reports"
    data = config.run / "checkpoints" / str(STEPS) / "data"
    positions = [f"process_{process}-of-{processes}.json" for process in range(processes)]
    assert not text or sorted(path.name for path in data.glob("process_*")) == positions


def assert_resumes_from(done, printed):
    assert ("resumes from step" in printed) == (done > 0), printed
    assert not done or f"resumes from step {done}." in printed, printed
    assert f"step {STEPS} of {STEPS}" in printed


def cut(config, steps):
    """Takes the checkpoints away that are of later steps."""
    for folder in (config.run / "checkpoints").iterdir():
        if int(folder.name) > steps:
            shutil.rmtree(folder)


def deviation(config, other):
    """The largest relative difference of losses, of all steps and evaluations."""
    histories = [History.read(each.run) for each in (config, other)]
    steps, losses = zip(*(np.array(h.train_loss).T for h in histories), strict=True)
    np.testing.assert_array_equal(*steps)
    assert steps[0].tolist() == list(range(1, STEPS + 1))
    evaluations = [np.array(history.losses())[:, 1] for history in histories]
    pairs = (losses, evaluations)
    return max(np.max(np.abs(one / two - 1)) for one, two in pairs)


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("text", ["8 devices", "2 processes", "2 processes", "1 device"]),
        ("images", ["2 processes", "2 devices", "8 devices", "1 device"]),
    ],
)
def test_a_run_that_moves_makes_the_losses_of_one_that_stays(tmp_path, monkeypatch, kind, places):
    config = RUNS[kind](tmp_path)
    other = dataclasses.replace(config, run=tmp_path / "other")
    train_at(config, "1 device", monkeypatch)
    for done, place in zip(range(0, STEPS, PART), places, strict=True):
        if done:
            cut(other, done)
        train_at(other, place, monkeypatch, done)
    assert deviation(config, other) < 1e-6
    losses = [loss for _, loss in History.read(config.run).train_loss]
    assert losses[-1] < losses[0] - 0.01  # it does train


@pytest.mark.long
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_moves_from_each_place_to_each_other(tmp_path, monkeypatch, kind):
    config = RUNS[kind](tmp_path)
    runs = {p: dataclasses.replace(config, run=tmp_path / p.replace(" ", "-")) for p in PLACES}
    for place, run in runs.items():
        train_at(run, place, monkeypatch)
    found = {}
    for before, after in itertools.permutations(PLACES, 2):
        moved = dataclasses.replace(config, run=tmp_path / "moved")
        shutil.copytree(runs[before].run, moved.run)
        cut(moved, PART)
        train_at(moved, after, monkeypatch, PART)
        for place, run in runs.items():  # that stayed where they are
            found[before, after, place] = deviation(run, moved)
        shutil.rmtree(moved.run)
    print(f"{kind}: {len(found)} comparisons, the largest deviation is {max(found.values()):.1e}")
    assert max(found.values()) < 1e-6, found


GONE = "JAX distributed service detected fatal errors"


def wait_for_checkpoint(config, running):
    deadline = time.monotonic() + 600
    while not (config.run / "checkpoints" / str(PART)).exists():
        assert [process.poll() for process in running] == [None] * len(running)
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_jax_ends_the_other_within_a_minute(tmp_path, victim):
    """Process 0 is noticed by its connections, the other by its silence. A collective that fails
    before ends in a traceback, and a checkpoint that was being written in a sentence."""
    config = dataclasses.replace(text_run(tmp_path), steps=100_000, evaluate_every=PART)
    running = start(config, 2)
    try:
        wait_for_checkpoint(config, running)
        running[victim].send_signal(signal.SIGKILL)
        _, errors = running[1 - victim].communicate(timeout=60)
    finally:
        for process in running:
            process.kill()
    endings = (GONE, "Traceback", "Another process of the run may have ended.")
    assert any(ending in errors for ending in endings), errors
    assert running[1 - victim].returncode in (1, -signal.SIGABRT)


def test_sigterm_saves_the_last_step_and_ends_all_processes(tmp_path):
    config = dataclasses.replace(text_run(tmp_path), steps=100_000)
    running = start(config, 2)
    try:
        wait_for_checkpoint(config, running)
        for process in running:
            process.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], outputs
    last = History.read(config.run).train_loss[-1][0]
    assert last < config.steps
    data = config.run / "checkpoints" / str(last) / "data"
    assert len(list(data.glob("process_?-of-2.json"))) == 2


@pytest.mark.long
def test_the_others_wait_for_a_check_that_takes_longer_than_a_collective_may(tmp_path):
    slow = """
    import time
    from examples import checkpoints
    check = checkpoints.set_aside
    checkpoints.set_aside = lambda *given: time.sleep(45) or check(*given)
    """
    running = start(text_run(tmp_path), 2, first=slow.strip())
    outputs = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        ("raise ValueError('There is no file x.')", 2, r"Process 1: There is no file x\.\n"),
        ("1 / 0", 1, r"(?s)Traceback .*ZeroDivisionError: division by zero\n"),
    ],
)
def test_a_process_that_fails_alone_does_not_leave_the_other_waiting(tmp_path, error, status, says):
    alone = f"if config.distributed.process: {error}"
    running = start(text_run(tmp_path), 2, first=alone, heartbeat=10)
    try:
        _, errors = running[1].communicate(timeout=600)
        failed = time.monotonic()
        _, other = running[0].communicate(timeout=60)
    finally:
        for process in running:
            process.kill()
    assert re.fullmatch(says, errors)
    assert running[1].returncode == status
    assert GONE in other or "Traceback" in other
    assert running[0].returncode in (1, -signal.SIGABRT)
    assert time.monotonic() - failed < 60


def test_a_number_of_processes_that_cannot_share_the_readers_is_refused(tmp_path):
    text = TextData(str(tmp_path / "text"), readers=3, cache=tmp_path / "cache")
    config = dataclasses.replace(text_run(tmp_path), data=text, batch_size=18, accumulate=1)
    running = start(config, 2)
    outputs = [process.communicate(timeout=600)[1] for process in running]
    refused = "--data.readers must divide --batch-size 18 and be a multiple of the number of "
    assert f"Process 0: {refused}processes (2), got 3.\n" == outputs[0]
