"""The notebooks as they are stored: what a reader sees before anything runs. `make notebooks` runs
them."""

import ast
import json
import re
import sys

import pytest

from helpers import ROOT
from notebooks import SHORT

FILES = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
# Paths of a machine, addresses in memory and warnings say nothing to a reader.
NOISE = re.compile(
    r"/(home|root|tmp|usr|work|content|Users)/|\b0x[0-9a-f]{6,}|\w*Warning|site-packages"
)


@pytest.fixture(params=FILES)
def name(request):
    return request.param


@pytest.fixture
def notebook(name):
    return json.loads(FILES[name].read_text())


def cells(notebook, kind):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def outputs(notebook):
    return [output for cell in cells(notebook, "code") for output in cell["outputs"]]


def test_there_are_four_with_a_short_form_each():
    assert set(FILES) == set(SHORT) == {"quickstart", "llama", "vit", "averaging"}


def test_each_begins_with_one_title(notebook):
    texts = [source(cell) for cell in cells(notebook, "markdown")]
    titles = [line for text in texts for line in text.splitlines() if line.startswith("# ")]
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert titles == [texts[0].splitlines()[0]]


def test_the_first_cell_of_code_installs_what_the_others_import(notebook):
    """And nothing where the package is there. NumPy, JAX and Optax come with gpa-optax."""
    first, *others = (source(cell) for cell in cells(notebook, "code"))
    condition, installed = first.split('if importlib.util.find_spec("gpa_optax") is None:\n')
    assert not set("%!") & set(condition)
    (packages,) = re.findall(r"^    %pip install --quiet (gpa-optax.*)$", installed)
    code = "\n".join(others)
    assert not re.search("^ *!", code, re.MULTILINE)
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", code, re.MULTILINE))
    modules = {"gpa-optax": "gpa_optax", "scikit-learn": "sklearn"}
    expected = {modules.get(package, package) for package in packages.split()}
    assert imported - sys.stdlib_module_names - {"jax", "numpy", "optax"} == expected


def test_links_need_no_repository(notebook):
    links = re.findall(r"\]\(([^)]*)\)", "\n".join(map(source, notebook["cells"])))
    assert set(links) <= {"https://arxiv.org/abs/2512.17131"}


def test_all_cells_ran_in_order_and_none_failed(notebook):
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs(notebook)} <= {
        "stream", "display_data", "execute_result",
    }  # fmt: skip
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_outputs_are_what_a_reader_wants_to_see(name, notebook):
    for output in outputs(notebook):
        assert output.get("name") != "stderr"
        text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        assert not NOISE.search(text), text
    assert FILES[name].stat().st_size < 1_000_000


def test_metadata_tells_nothing_of_the_machine(notebook):
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags"}


def test_the_short_form_sets_variables_of_the_parameters_cell(name, notebook):
    tagged = [c for c in cells(notebook, "code") if "parameters" in c["metadata"].get("tags", ())]
    assert len(tagged) == 1
    assigned = {
        target.id for statement in ast.parse(source(tagged[0])).body for target in statement.targets
    }
    assert set(SHORT[name]) <= assigned


@pytest.mark.parametrize(("code", "status"), [("assert steps == 2", 0), ("assert steps == 1", 1)])
def test_running_sets_the_short_form_tells_of_errors_and_keeps_the_file(
    code, status, tmp_path, monkeypatch, capsys
):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    from notebooks import run

    first = nbformat.v4.new_code_cell("steps = 1", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[first, nbformat.v4.new_code_cell(code)])
    path = tmp_path / "small.ipynb"
    nbformat.write(notebook, path)
    before = path.read_bytes()
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "SHORT", {"small": {"steps": 2}})
    assert run.main([]) == status
    assert ("AssertionError" in capsys.readouterr().err) == (status == 1)
    assert path.read_bytes() == before
