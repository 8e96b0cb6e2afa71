"""`plan` counts collectives as they are executed, knows what optimizers hold, and compiles for
machines that are not here."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.needs import TRAINER, needs

needs(*TRAINER)
from jax.sharding import Mesh, PartitionSpec
from rich.console import Console

from examples import plan
from examples.llama.config import TrainLlama
from examples.settings import default_settings
from examples.sharding import make_mesh
from examples.train import build
from helpers import ROOT
from planning import machines
from planning.collectives import Collective, traffic
from planning.reports import show_memory

needs_8_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
needs_cuda_plugin = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"), reason="needs jax-cuda13-plugin"
)
SMALL = ("--length", "128", "--model.dim", "128")
RING = [(i, (i + 1) % 8) for i in range(8)]


def compiled(function, scalars=()):
    """The text of a program on 8 devices, each of which has an eighth of the rows of an array."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))
    specs = (PartitionSpec("d"), *(PartitionSpec() for _ in scalars))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    arguments = (jax.ShapeDtypeStruct((64, 32), jnp.float32), *scalars)
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def repeated(times, function):
    return lambda x: jax.lax.scan(lambda x, _: (function(x), None), x, length=times)[0]


def executions(*expected):
    return Counter({Collective(kind, size): times for kind, size, times in expected})


MINE = 8 * 32 * 4  # bytes of the rows that a device has


@needs_8_devices
@pytest.mark.parametrize(
    ("function", "kind", "size"),
    [
        (lambda x: jax.lax.psum(x, "d"), "all-reduce", MINE),
        (lambda x: jax.lax.all_gather(x, "d"), "all-gather", 8 * MINE),
        (lambda x: jax.lax.psum_scatter(x, "d"), "reduce-scatter", MINE),
        (lambda x: jax.lax.ppermute(x, "d", RING), "collective-permute", MINE),
        (lambda x: jax.lax.all_to_all(x, "d", 0, 0), "all-to-all", MINE),
    ],
)
def test_a_collective_counts_once_with_the_bytes_of_the_whole_array(function, kind, size):
    assert traffic(compiled(function)).executions == executions((kind, size, 1))


@needs_8_devices
def test_a_collective_in_a_loop_counts_as_often_as_the_loop_turns():
    def psum(x):
        return jnp.sin(jax.lax.psum(x, "d"))

    def gather(x):
        return jax.lax.all_gather(jnp.cos(x), "d").mean(0)

    def function(x):
        return repeated(3, lambda x: gather(repeated(5, psum)(x)))(repeated(7, gather)(x))

    found = traffic(compiled(function))
    assert found.executions == executions(("all-reduce", MINE, 15), ("all-gather", 8 * MINE, 10))
    assert found.unknown_loops == 0
    assert found.total("all-gather") == (10, 80 * MINE)


@needs_8_devices
def test_of_the_branches_of_a_condition_the_larger_one_counts():
    def function(x, flag):
        return jax.lax.cond(
            flag,
            lambda x: jax.lax.psum(x, "d") + jax.lax.psum(jnp.sin(x), "d"),
            lambda x: x + jax.lax.psum(x.sum(0), "d"),
            x,
        )

    text = compiled(function, scalars=(jax.ShapeDtypeStruct((), bool),))
    assert traffic(text).total("all-reduce")[1] == 2 * MINE


@needs_8_devices
def test_a_loop_of_unknown_length_counts_once_and_is_told():
    def function(x):
        return jax.lax.while_loop(
            lambda x: jax.lax.pmax(x.max(), "d") > 1, lambda x: jax.lax.psum(x, "d") / 9, x
        )

    found = traffic(compiled(function))
    assert found.unknown_loops == 1
    assert found.executions[Collective("all-reduce", MINE)] == 1


def stored(name):
    """A program for a machine that is not here, of which only some instructions were kept."""
    return (ROOT / "tests/fixtures/hlo" / f"{name}.txt").read_text()


def test_a_start_and_its_done_count_once():
    # Here they stand for several collectives in one, and around another instruction.
    assert traffic(stored("h100")).executions == executions(
        ("all-gather", (256 * 256 + 256) * 2, 5),
        ("reduce-scatter", 256 * 256 * 2, 5),
        ("all-to-all", 32, 1),
        ("all-reduce", 32, 1),
    )


def test_on_tpus_loops_count_by_their_counters_and_chains_of_fusions_once():
    # The inner loop passes weights around while it multiplies with them; one all-gather goes on in
    # three fusions, one of them in that loop; an all-reduce of which each device keeps its part is
    # a fusion of its own.
    found = traffic(stored("v5e"))
    assert found.unknown_loops == 0
    assert found.executions == executions(
        ("collective-permute", 32 * 512 * 2, 5 * 4),  # from 0 below 8 in steps of 2
        ("all-gather", 2048 * 4, 5),
        ("reduce-scatter", 512 * 512 * 2, 5),
    )


def tiny(optimizer, **changes):
    config = TrainLlama(
        optimizer=optimizer, settings=default_settings(optimizer, 1e-3, 0.1), **changes
    )
    return config, build(config, config.task(), make_mesh(4, jax.devices()[:8]))


@needs_8_devices
@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        ("adamw", {"m", "v"}),
        ("gpa-adamw", {"x", "v"}),
        ("schedule-free-adamw", {"z", "v"}),
        ("diloco-adamw", {"m", "v", "slow weights", "momentum"}),
    ],
)
def test_buffers_are_those_of_the_method_each_as_large_as_the_params(optimizer, names):
    _, program = tiny(optimizer)
    params = machines.per_device(program.state.params)
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(program.state.params))
    assert total / 4 <= params < total / 3  # split over 4 devices but for small leaves
    assert plan.buffers(program.state.opt_state) == dict.fromkeys(names, params)


@needs_8_devices
def test_it_fits_exactly_if_the_device_has_as_much_as_xla_says():
    _, program = tiny("gpa-adamw")
    target = machines.Target("cpu", jax.devices()[:8], None, "jaxlib")
    console = Console(quiet=True)
    step = plan.compile_step(program, target, "gpa-adamw", console)
    memory = step.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed += memory.generated_code_size_in_bytes
    show = partial(show_memory, memory, {}, 0)
    assert show(target._replace(memory=needed / machines.GIB), console)
    assert not show(target._replace(memory=(needed - 1) / machines.GIB), console)


def run_plan(*flags):
    """What the command prints, started as a user starts it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-m", "examples.llama", "plan", "--data.source", "/nowhere", *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_plan_compiles_the_step_for_eight_cpus():
    code, out, err = run_plan("--target", "cpu:8", "--fsdp", "4", *SMALL)
    assert (code, err) == (0, "")
    assert "--fsdp 4 --batch-size 40 --accumulate 5" in " ".join(out.split())
    for name in ("GPA-AdamW, b1 = 0 (this run)", "Schedule-Free-AdamW", "DiLoCo-AdamW"):
        assert name in out
    assert "all-gather" in out
    assert "GPA-AdamW adds none: both programs have the same collectives." in out


@needs_libtpu
def test_plan_compiles_the_step_for_tpus():
    code, out, err = run_plan("--target", "v5e:2x2", *SMALL)
    assert code == 0, err
    assert "It fits into the 15.75 GiB of a device" in out
    assert "GPA-AdamW adds none: both programs have the same collectives." in out


@needs_libtpu
def test_plan_says_what_does_not_fit():
    flags = ("--preset", "1b", "--model.layers", "1", "--length", "128", "--batch-size", "4096")
    code, out, _ = run_plan("--target", "v5e:1x1", *flags, "--accumulate", "1")
    assert code == 1
    assert "With GPA-AdamW it does not fit: " in out
    assert "15.75G" in out


@needs_libtpu
def test_a_mesh_may_cut_an_axis_of_the_torus():
    mesh = make_mesh(64, machines.find("v5p:4x4x8").devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 64}


@needs_cuda_plugin
def test_plan_compiles_the_step_for_gpus():
    code, out, err = run_plan("--target", "h100:8", *SMALL)
    assert code == 0, err
    assert "It fits into the 79.14 GiB of a device" in out
    assert "GPA-AdamW adds none: both programs have the same collectives." in out


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("abacus:4", "--target abacus:4: give v4, v5e, v5p, v6e, h100 or cpu, and a size."),
        ("v5e", "--target v5e: no such v5e exists; there are 1x1, 2x2, 2x4, 4x4"),
        ("v5e:3x3", "--target v5e:3x3: no such v5e exists; there are 1x1, 2x2, 2x4, 4x4"),
        ("v5p:4x4", "--target v5p:4x4: no such v5p exists; there are 2x2x1, 2x2x2"),
        ("v5p:8x4x4", "--target v5p:8x4x4: no such v5p exists"),
        ("h100:12", "after the colon comes the number of devices, such as h100:8"),
        ("h100:", "after the colon comes the number of devices, such as h100:8"),
        ("cpu:0", "after the colon comes the number of devices, such as cpu:8"),
    ],
)
def test_a_machine_that_does_not_exist_is_told_in_one_sentence(target, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        machines.find(target)


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("v5p:4x4x8", 'pip install "jax[tpu]"'),
        (
            "h100:64",
            f"pip install --no-deps jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt==",
        ),
    ],
)
def test_a_compiler_that_is_missing_is_named(target, command, monkeypatch):
    monkeypatch.setattr(machines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs a compiler that is not installed") as error:
        machines.find(target)
    assert command in str(error.value)
