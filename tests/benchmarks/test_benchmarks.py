"""The benchmarks run, and what they measure adds up."""

import json
import subprocess
import sys

import pytest

from helpers.needs import needs

needs("grain", "tyro")

from benchmarks.train_step import covered
from helpers import ROOT, environment

pytestmark = pytest.mark.processes


def test_overlapping_spans_count_once():
    assert covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.7)]) == 5.0


def test_the_parts_of_a_training_step_add_up(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--steps", "15", "--rounds", "3"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "GFLOP/s" in done.stdout
    result = json.loads(out.read_text())
    loop, parts = result["loop"], result["parts"]
    assert 0 < loop["in XLA"] <= loop["wall"]
    assert loop["waiting for input"] + loop["reporting"] < loop["wall"]
    assert 0 < result["gflops"] < 2 * result["peak_gflops"]
    assert parts["forward and backward"] > 0.3 * parts["whole step"]
