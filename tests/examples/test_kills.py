"""A run that is killed again and again is the run that was never killed, bit for bit.

The runs are those of the command line, each in a process of its own, and each process is ended by
SIGKILL at a moment that the folder of the run shows: in a step, in an evaluation, or while a
checkpoint is being written.
"""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from helpers.needs import TRAINER, needs

needs(*TRAINER)
from examples.config import from_json
from examples.llama.config import TrainLlama
from examples.metrics import records
from examples.vit.config import TrainViT
from helpers import ROOT, environment
from helpers.loops import assert_same
from helpers.programs import saved, write_text

pytestmark = pytest.mark.processes

KINDS = {"llama": TrainLlama, "vit": TrainViT}
EVERY = 4  # steps from one checkpoint to the next
MOMENTS = ("in a step", "in an evaluation", "in a checkpoint write")
SEED = 20251212


def command(workload, folder, run, steps, *flags):
    small = {
        "llama": ["--batch-size", "8", "--validation-examples", "64", "--data.shuffle", "16",
                  "--data.source", folder / "text", "--data.cache", folder / "cache"],
        "vit": ["--batch-size", "16"],
    }[workload]  # fmt: skip
    every = ["--evaluate-every", EVERY, "--log-every", "1", "--run", folder / run]
    command = [sys.executable, "-m", f"examples.{workload}", "--steps", steps, *every, *small]
    return [str(word) for word in (*command, *flags)]


def start(arguments, output):
    wide = environment() | {"COLUMNS": "200"}
    return subprocess.Popen(arguments, cwd=ROOT, env=wide, stdout=output, stderr=subprocess.STDOUT)


def run_to_the_end(arguments, folder):
    with (folder / "output.txt").open("w+") as output:
        status = start(arguments, output).wait(timeout=600)
        output.seek(0)
        text = output.read()
    assert status == 0, text
    return text


def last_line(run):
    path = run / "metrics.jsonl"
    if not path.exists():
        return {"step": 0}
    with path.open("rb") as file:  # its end alone, because this is asked all the time
        file.seek(max(0, path.stat().st_size - 4000))
        lines = file.read().split(b"\n")[1:-1]  # whole ones
    return json.loads(lines[-1]) if lines else {"step": 0}


def file_number(run):
    path = run / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def moments(run):
    """What a run is doing, or was when it ended, as its folder shows. A checkpoint is written
    while training goes on."""
    folder, last = run / "checkpoints", last_line(run)
    if folder.exists() and any("tmp" in path.name for path in folder.iterdir()):
        yield "in a checkpoint write"
    if "loss" in last:
        # The line of a step comes before its evaluation, and the evaluation's line after it.
        yield "in an evaluation" if last["step"] % EVERY == 0 else "in a step"


def whole_checkpoints(run):
    folder = run / "checkpoints"
    found = folder.iterdir() if folder.exists() else []
    return [int(path.name) for path in found if path.name.isdecimal()]


def kill_at(arguments, run, wanted, after, chooser, log):
    """Starts the command, and kills it at a random one of such moments after that step."""
    with log.open("w") as output:
        before = file_number(run)
        process = start(arguments, output)
        # What the folder shows is of the run before until this one has made the file anew.
        while file_number(run) == before or last_line(run)["step"] < after:
            wait(process, log)
        while True:
            wait(process, log)
            if wanted in moments(run) and chooser.random() < 0.5:
                # It stays at this moment while it is looked at, as soon as it has stopped.
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                if wanted in moments(run):
                    break
                process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()
    assert wanted in moments(run)


def wait(process, log):
    time.sleep(0.001)
    assert process.poll() is None, log.read_text()


def killed_and_resumed(workload, folder, kills):
    """Compares a run that is killed so often with one that is not."""
    chooser = random.Random(SEED)
    print(f"Seed {SEED}, {workload}, {kills} kills.")
    if workload == "llama":
        write_text(folder / "text")
    steps = 4 * EVERY * (kills + 2)  # a moment may pass unseen, and come again
    run_to_the_end(command(workload, folder, "whole", steps), folder)
    run, arguments = folder / "killed", command(workload, folder, "killed", steps)
    order = [MOMENTS[number % len(MOMENTS)] for number in range(kills)]
    chooser.shuffle(order)
    from_steps = []
    for number, wanted in enumerate(order):
        newest = max(whole_checkpoints(run), default=0)
        after = newest + chooser.randrange(EVERY, 3 * EVERY)
        log = folder / f"{number}.txt"
        kill_at(arguments, run, wanted, after, chooser, log)
        print(f"  Kill {number + 1}: after step {last_line(run)['step']}, {wanted}.")
        assert_resumed_from(newest, log.read_text())
        from_steps.append(newest)
    # And one that asks, between two checkpoints: nothing is made again.
    done = stopped_by_sigterm(
        arguments, run, max(whole_checkpoints(run), default=0) + EVERY + 1, folder
    )
    text = run_to_the_end(arguments, folder)
    assert_resumed_from(done, text)
    compare(KINDS[workload], folder / "whole", run, steps)
    print(f"  {dict(collections.Counter(order))}; begun at steps {from_steps} and {done}.")


def stopped_by_sigterm(arguments, run, after, folder):
    """Returns the step of the checkpoint that it wrote before it ended."""
    log = folder / "sigterm.txt"
    with log.open("w") as output:
        before = file_number(run)
        process = start(arguments, output)
        while file_number(run) == before or last_line(run)["step"] < after:
            wait(process, log)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # as from a scheduler and from its shell
        assert process.wait(timeout=300) == 0, log.read_text()
    assert "resumes from there" in log.read_text()
    done = last_line(run)["step"]
    assert max(whole_checkpoints(run)) == done
    return done


def assert_resumed_from(step, text):
    """From the newest checkpoint that was whole, and none was found to be damaged."""
    assert ("resumes from step" in text) == (step > 0), text
    assert step == 0 or f"resumes from step {step}." in text, text
    assert "damaged" not in text, text


def compare(kind, whole, killed, steps):
    """The same losses at every step, and the same state, of which params and x are parts."""

    def curve(run):
        timed = ("seconds_per_step", "input_seconds_per_step", "per_second")
        lines = [line for line in records(run / "metrics.jsonl") if "size" not in line]
        return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines]

    assert curve(killed) == curve(whole)
    assert sum("loss" in line for line in curve(killed)) == steps
    states = []
    for run in (whole, killed):
        stored = json.loads((run / "config.json").read_text())["config"]
        states.append(saved(from_json(kind, stored), steps))
    assert_same(*states)


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    killed_and_resumed("llama", tmp_path, len(MOMENTS))


@pytest.mark.long
@pytest.mark.parametrize("workload", KINDS)
def test_a_run_that_is_killed_twenty_times_resumes_bit_for_bit(workload, tmp_path):
    killed_and_resumed(workload, tmp_path, 20)
