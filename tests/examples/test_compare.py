"""The commands as people type them: they train, stop, resume, compare, and say what is wrong."""

import json
import signal
import subprocess
import sys
import time

import pytest

from helpers.needs import TRAINER, needs

needs(*TRAINER, "sklearn")

from rich.console import Console

from examples import compare, metrics, plots
from examples.commands import run_command
from examples.config import parse_run
from examples.llama.__main__ import main as llama_main
from examples.llama.config import TrainLlama
from examples.metrics import History
from examples.vit.__main__ import main as vit_main
from helpers import ROOT, environment
from helpers.programs import on_devices, write_text

pytestmark = pytest.mark.processes

MODEL = "--model.vocab-size 300 --model.dim 16 --model.hidden 32 --batch-size 4 --length 16"
TERMINAL = {"PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
RUN = "--evaluate-every 10 --validation-examples 8"


def command(*arguments):
    return [sys.executable, "-m", *map(str, arguments)]


def finish(*arguments, status=0):
    """Runs a command to its end; returns what it printed."""
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment() | TERMINAL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_text(folder / "text")
    return ["--data.source", folder / "text", "--data.cache", folder / "cache"]


def test_a_comparison_from_end_to_end(tmp_path, text):
    arguments = ["examples.compare", "llama", *MODEL.split(), *RUN.split(), *text, "--steps", "30"]
    printed = finish(*arguments, "--out", tmp_path / "out")
    for part in ("AdamW", "GPA-AdamW at x", "steps", "saved", "Sampled from the model that GPA"):
        assert part in printed
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    adamw, gpa = results["runs"]["AdamW"], results["runs"]["GPA-AdamW"]
    assert [step for step, _ in gpa["validation"]["x"]] == [0, 10, 20, 30]
    # The same initialization and data: the first losses are one number.
    firsts = {run["validation"][w][0][1]["loss"] for run in (adamw, gpa) for w in run["validation"]}
    assert len(firsts) == 1
    assert adamw["train_loss"][0] != gpa["train_loss"][0]
    for run in (adamw, gpa):
        assert all(
            curve[-1][1]["loss"] < curve[0][1]["loss"] for curve in run["validation"].values()
        )
        assert run["size"]["step_bytes"] > run["size"]["optimizer_bytes"] > 0
    # Without b1 GPA keeps v and x where AdamW keeps m and v; what differs are scalars.
    assert abs(gpa["size"]["optimizer_bytes"] - adamw["size"]["optimizer_bytes"]) < 100


def test_ctrl_c_stops_a_comparison_and_the_same_command_ends_it(tmp_path, text):
    arguments = [
        "examples.compare", "llama", *MODEL.split(), *RUN.split(), *text, "--steps", "400",
        "--evaluate-every", "200", "--log-every", "1", "--out", tmp_path / "out",
    ]  # fmt: skip
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment() | TERMINAL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    metrics = tmp_path / "out" / "adamw" / "metrics.jsonl"
    until = time.monotonic() + 200
    while time.monotonic() < until and not (
        metrics.exists() and "grad_norm" in metrics.read_text()
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    assert "Stopped after step" in out
    assert "the same command resumes from there." in out
    assert "No comparison" in out
    stopped = History.read(tmp_path / "out" / "adamw").train_loss[-1][0]
    assert 0 < stopped < 400
    assert f"AdamW: resumes from step {stopped}." in finish(*arguments)
    assert History.read(tmp_path / "out" / "gpa-adamw").done == 400


def test_a_vit_trains_and_compares(tmp_path):
    printed = finish(
        "examples.vit", "--steps", "40", "--evaluate-every", "20", "--run", tmp_path / "run"
    )
    assert "digits" in printed
    assert "accuracy" in printed
    history = History.read(tmp_path / "run")
    assert history.last()["loss"] < history.losses()[0][1]
    assert (tmp_path / "run" / "summary.png").read_bytes().startswith(b"\x89PNG")
    printed = finish(
        "examples.compare", "vit", "--steps", "4", "--evaluate-every", "2", "--out",
        tmp_path / "out", "--optimizers", "adamw", "schedule-free-adamw",
        "--schedule-free-adamw.learning-rate", "0.1",
    )  # fmt: skip
    assert "Schedule-Free-AdamW at x" in printed
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())["config"]
    assert stored["settings"]["schedule-free-adamw"]["learning_rate"] == 0.1


def history(losses, **other):
    return History(
        {"optimizer_bytes": 1, "step_bytes": 2},
        validation={"x": [(step, {"loss": loss}) for step, loss in losses]},
        **other,
    )


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ([(0, 5.0), (50, 3.1), (75, 3.0), (100, 2.9)], "at step 75 of 100, 25% fewer steps"),
        ([(0, 5.0), (50, 3.5), (100, 3.2)], "did not reach AdamW's final loss: 3.2000 against 3.0"),
        ([(0, 5.0), (100, 3.0)], "at step 100 of 100, 0% fewer steps"),
        ([(0, 5.0), (50, 1.0)], "No comparison: it needs complete runs"),
    ],
)
def test_the_verdict_is_the_winner_whoever_that_is(losses, says):
    runs = {"AdamW": history([(0, 5.0), (100, 3.0)]), "GPA-AdamW": history(losses)}
    assert says in compare.verdicts(runs, 100, "AdamW")[0]


def test_each_workload_tells_its_flags(capsys):
    for main, arguments in (
        (llama_main, ["--help"]),
        (llama_main, ["--preset", "8b", "--help"]),
        (vit_main, ["--help"]),
        (compare.main, ["llama", "--help"]),
        (compare.main, ["vit", "--optimizers", "adamw", "diloco-lion", "--help"]),
    ):
        with pytest.raises(SystemExit, match="0"):
            run_command(main, arguments)
    printed = capsys.readouterr().out
    for part in ("(default: 14336)", "--diloco-lion.sync-period", "--data.tokenizer", "--fsdp"):
        assert part in printed


@pytest.mark.parametrize(
    ("workload", "flags", "says"),
    [
        ("llama", "--steps 0", "--steps must be at least 1, got 0"),
        ("llama", "--batch-size 40 --accumulate 3", "must be a multiple of --accumulate (3)"),
        ("llama", "--model.heads 3", "must be a multiple of --model.heads (3)"),
        ("llama", "--model.vocab-size 100", "--model.vocab-size must be at least 257"),
        ("llama", "--preset 3b", "invalid choice"),
        ("llama", "--optimizer adam", "invalid choice"),
        ("llama", "--mu-y 1.0", "mu-y must be in [0, 1), got 1.0"),
        ("llama", "--average constant --window -0.1", "window must be positive, got -0.1"),
        ("llama", "--learning-rate 0", "learning-rate must be positive, got 0"),
        ("llama", "--warmup 1.5", "warmup must be a part of the run in [0, 1) or a whole number"),
        ("llama", "--warmup 2000", "--warmup 2000 must leave room in the 1000 updates of --steps."),
        (
            "llama",
            "--schedule wsd --decay 0.5 --warmup 600",
            "--warmup 600 must leave room in the 1000 updates of --steps, also for --decay 0.5.",
        ),
        ("llama", "--schedule wsd --decay 0.99", "decay must be positive and leave room"),
        ("llama", "--length 1000000", "--length must be below the"),
        ("llama", "--data.source {tmp}/none", "--data.source"),
        ("llama", "--data.source {tmp}", "--data.source"),
        ("llama", "--data.tokenizer {tmp}/none.json", "--data.tokenizer"),
        ("llama", "--optimizer adamw --model.param-dtype bfloat16", "holds none"),
        ("llama", "--fsdp 3", "--fsdp must divide the number of devices"),
        ("llama", "--processes 2", "need --distributed"),
        ("llama", "--distributed --processes 2", "together, or none"),
        ("vit", "--model.patch 3", "--model.patch must divide"),
        ("vit", "--data.source {tmp}/none", "--data.source"),
        (
            "vit",
            "--preset s16 --data.source digits --data.image-size None",
            "set --data.image-size",
        ),
        ("vit", "--label-smoothing 1", "--label-smoothing must be in [0, 1), got 1.0"),
    ],
)
def test_bad_flags_end_in_one_sentence(tmp_path, text, workload, flags, says, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("jax.stages.Lowered.compile", lambda *_: pytest.fail("compiled"))
    arguments = ["--run", tmp_path / "run", *flags.format(tmp=tmp_path).split()]
    if workload == "llama" and "--data.source" not in flags:
        arguments += text
    main = {"llama": llama_main, "vit": vit_main}[workload]
    with on_devices(1, monkeypatch):
        try:
            status = run_command(main, list(map(str, arguments)))
        except SystemExit as stop:  # by tyro, for what is wrong with a flag by itself
            status = stop.code
    printed = capsys.readouterr()
    assert status == 2
    assert says in printed.out + printed.err
    assert "Traceback" not in printed.out + printed.err
    assert not (tmp_path / "run").exists()


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path, text, capsys):
    arguments = ["--run", tmp_path / "run", "--batch-size", "12", *text]  # here are 8 devices
    assert run_command(llama_main, list(map(str, arguments))) == 2
    assert "must be a multiple of the 8 devices, got 12 / 1" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["gpt"], ["--steps", "3"]])
def test_a_comparison_needs_to_know_of_what(arguments, capsys):
    assert run_command(compare.main, arguments) == 2
    assert "Say what to train: python -m examples.compare llama, or vit" in capsys.readouterr().err


def test_a_line_that_a_crash_cut_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2}\n{"step": 2, "a')
    assert metrics.records(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 2}]


def test_the_last_of_repeated_flags_decides_the_defaults():
    arguments = ["--optimizer", "gpa-adamw", "--optimizer=lion"]
    config = parse_run(TrainLlama, "test", arguments)
    assert config.optimizer == "lion"
    assert config.settings == TrainLlama.preset_settings("tiny", "lion")


def test_a_comparison_is_known_again_by_what_decides_its_numbers():
    def folder(*arguments):
        return compare.parse_comparison("llama", arguments).out

    same = folder("--optimizers", "adamw", "lion")
    assert same == folder("--optimizers", "adamw", "lion", "--keep", "9", "--data.cache", "c")
    assert same == folder("--optimizers=adamw", "--optimizers", "adamw", "lion", "--no-resume")
    assert same != folder("--optimizers", "adamw", "lion", "--validation-examples", "3")
    assert same != folder("--optimizers", "adamw", "lion", "--lion.learning-rate", "1")


def test_a_table_shows_what_was_evaluated_at_the_last_step():
    run = history([(0, 5.0), (4, 3.0)])
    run.validation["y"] = [(0, {"loss": 5.0})]
    run.seconds = [1.0]
    table = plots.results_table({"GPA": run}, steps=4)
    assert list(table.columns[0].cells) == ["GPA at x"]


def test_an_unknown_command_is_named(capsys):
    assert run_command(llama_main, ["smaple", "run"]) == 2
    said = capsys.readouterr().err
    assert "There is no command smaple: give export or sample or plan, or none to train" in said
    assert "python -m examples.llama --steps 100" in said


def test_a_table_loses_no_digit_on_a_narrow_terminal():
    end = {"loss": 2.1597, "accuracy": 0.2138}
    validation = [(0, {"loss": 5.0, "accuracy": 0.1}), (12345, end)]
    names = ["AdamW", "Schedule-Free-AdamW", "DiLoCo-AdamW"]
    runs = {
        name: History(
            {"optimizer_bytes": 5 * 2**20, "step_bytes": 34 * 2**20},
            validation={"x": validation, "y": validation},
            seconds=[0.0124],
        )
        for name in names
    }
    console = Console(width=80, record=True)
    console.print(plots.results_table(runs, 12345, "AdamW"))
    shown = console.export_text()
    assert "…" not in shown
    assert shown.count("2.1597 ") == shown.count("0.2138 ") == 6
    assert all(name in shown for name in names)
