"""A state that one release saved is read, and continued, in every later one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import tree_unflatten

import gpa_optax
from helpers import saved_states
from helpers.needs import NEEDS_MUON, marked
from helpers.saved_states import (
    FOLDER,
    SHAPES,
    by_path,
    load,
    programs,
    saved_programs,
    sequences,
    step,
)

RELEASES = {folder.name: load(folder) for folder in sorted(FOLDER.iterdir())}
SAVED = [(release, name) for release, leaves in RELEASES.items() for name in saved_programs(leaves)]
of_each_program = pytest.mark.parametrize(
    ("release", "name"), marked(NEEDS_MUON, SAVED, "gpa_muon")
)


def part(leaves, prefix):
    """The leaves under a prefix."""
    return {path: leaf for path, leaf in leaves.items() if path.startswith(prefix + " ")}


def form(name):
    """Params and state of a program, of which only the form counts."""
    program = programs()[name]
    params = {leaf: jnp.zeros(shape, program.dtype) for leaf, shape in SHAPES.items()}
    return {"params": params, "opt_state": program.make().init(params)}


def restored(leaves, name):
    """Into the form of now, leaf by leaf, as flax, np.savez and equinox restore."""
    saved = jax.tree.map(jnp.asarray, list(part(leaves, name).values()))
    return tree_unflatten(jax.tree.structure(form(name)), saved)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(
            np.float64(found[path]), expected[path], tolerance, tolerance, err_msg=path
        )


@of_each_program
def test_the_form_of_the_state_is_that_of_the_saved_one(release, name):
    """Names, order, shapes and dtypes: whichever of them a checkpoint's library goes by."""
    saved = part(RELEASES[release], name)
    now = by_path(form(name), name)
    assert [*now] == [*saved]
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in now.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in saved.items()
    }


@of_each_program
def test_a_saved_state_is_read_and_continues_as_the_oracle_does(release, name):
    leaves = RELEASES[release]
    program, state = programs()[name], restored(leaves, name)
    params, opt_state = state["params"], state["opt_state"]
    for moment in ("saved", "next"):
        if moment == "next":
            gradient = tree_unflatten(
                jax.tree.structure(params), part(leaves, f"{name}: gradient").values()
            )
            params, opt_state = step(program.make(), gradient, params, opt_state)
        prefix = f"{name}: {moment}"
        expected = part(leaves, prefix)
        assert_close(by_path(sequences(opt_state, params), prefix), expected, 1e-5)
        # Of bfloat16 params the state holds y at full precision.
        x, y = gpa_optax.eval_params(opt_state, params), params
        tolerance = 1e-5 if program.dtype == jnp.float32 else 1e-2
        found = by_path({"x": x, "y": y}, prefix)
        assert_close(found, {path: expected[path] for path in found}, tolerance)


@of_each_program
def test_orbax_restores_a_saved_state_bit_for_bit(release, name):
    ocp = pytest.importorskip("orbax.checkpoint")
    item = {name: form(name)}  # a part of what was saved: an older optax lacks the form of one
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(
            (FOLDER / release / "orbax").absolute(),
            ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True),
        )
    saved, state = part(RELEASES[release], name), by_path(found[name], name)
    assert [*state] == [*saved]
    for path, leaf in state.items():
        assert leaf.dtype == saved[path].dtype, path
        assert leaf.tobytes() == saved[path].tobytes(), path


def test_this_release_has_its_states_saved():
    saved = RELEASES.get(gpa_optax.__version__, {})
    assert saved_programs(saved) == [*programs()], (
        "see CONTRIBUTING.md: PYTHONPATH=tests python -m helpers.saved_states"
    )


def test_a_saved_state_is_not_overwritten():
    pytest.importorskip("orbax.checkpoint")
    release = next(iter(RELEASES))
    with pytest.raises(FileExistsError, match=re.escape(release)):
        saved_states.make(FOLDER / release)


def test_saved_states_stay_small_and_hold_no_path_of_the_machine_that_saved_them():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 150_000 * len(RELEASES)
    folder = b"/".join(part.encode() for part in FOLDER.parts[-2:])
    assert not [path for path in files if folder in path.read_bytes()]
