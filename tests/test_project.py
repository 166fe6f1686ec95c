"""What the project says of itself is true."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import QUESTIONS, ROOT

import qvl_batch
from qvl_batch import errors

README = (ROOT / "README.md").read_text()
TREE = re.search(r"^qvl_batch/ .*?^tests/", README, re.DOTALL | re.MULTILINE)[0]
#: Modules of the worker in the README's order, each above those that may import it.
ORDER = re.findall(r"── (\w+)\.py", TREE.split("export/")[0])
COMPARISON = re.findall(r"── (\w+)\.py", TREE.split("comparison/")[1])


def _imports(path):
    """Modules that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _files(package):
    return {path.stem: path for path in (ROOT / package).glob("*.py") if not path.stem.startswith("__")}


def test_imports_point_one_way():
    for place, name in enumerate(ORDER):
        for module in _imports(_files("qvl_batch")[name]):
            if module.startswith("qvl_batch."):
                assert module.split(".")[1] in ORDER[:place], f"{name} imports {module}"
            assert module.split(".")[0] not in ("export", "comparison"), name
    for place, name in enumerate(COMPARISON):
        for module in _imports(_files("jobs/comparison")[name]):
            if module.startswith("comparison."):
                assert module.split(".")[1] in COMPARISON[:place], f"{name} imports {module}"


def test_two_bundles_are_compared_with_what_the_extra_brings(tiny_bundle, tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"worker": project["dependencies"], **project["optional-dependencies"]}
    packages = {extra: {re.match(r"[\w-]+", each)[0].replace("-", "_") for each in lists[extra]} for extra in lists}
    missing = packages["export"] - packages["compare"] - packages["worker"]
    assert missing > {"torch", "transformers"}
    script = (
        "import runpy, sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name in {missing}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "sys.path.insert(0, 'jobs')\n"
        "runpy.run_path('jobs/compare.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", script, "--bundle", tiny_bundle.path, "--against-bundle", tiny_bundle.path]
    command += ["--input", QUESTIONS, "--limit", 1, "--output", tmp_path]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert "equal     1 of 1 answers" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("library", "modules"),
    [
        ("ray", {"pipeline", "workers"}),
        ("onnxruntime", {"runtime"}),
        ("torch", set()),
        ("onnx", set()),
        ("transformers", set()),
        ("tokenizers", {"layout"}),
        ("pillow_heif", {"formats"}),
    ],
)
def test_a_library_is_met_in_one_place(library, modules):
    files = _files("qvl_batch")
    found = {name for name, path in files.items() if library in {m.split(".")[0] for m in _imports(path)}}
    assert found == modules


def test_the_exporter_knows_only_the_contract_of_the_worker():
    for name, path in _files("export").items():
        used = {module for module in _imports(path) if module.startswith("qvl_batch")}
        contract = {"bundle", "errors", "command_line", "known_answers", "measures"}
        assert used <= {f"qvl_batch.{module}" for module in contract}, name


def test_what_the_worker_reads_is_installed_with_it():
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["qvl_batch"]
    found = {path.name for path in (ROOT / "qvl_batch").iterdir() if path.is_file() and path.suffix != ".py"}
    assert set(installed) == found > {"py.typed"}


def test_tasks_that_only_read_and_decode_import_no_heavy_library():
    heavy = {"transformers", "onnxruntime", "ray"}
    script = f"import sys, qvl_batch.pipeline.prepare; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names():
    names = {"Answer", "Bundle", "Captioner", "Failure", "JobError", "QvlBatchError", "RowError"}
    assert set(qvl_batch.__all__) == names
    assert all(hasattr(qvl_batch, name) for name in names)


def test_the_tree_of_errors_is_drawn_whole():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    for error in (value for value in classes if issubclass(value, Exception)):
        (line,) = [line for line in errors.__doc__.splitlines() if re.search(rf"\b{error.__name__}\b", line)]
        depth = (len(error.__mro__) - len(errors.QvlBatchError.__mro__)) * 4 + 4
        assert line.index(error.__name__) == depth


def test_datasets_hides_no_library():
    assert not (ROOT / "datasets" / "__init__.py").exists()
    for path in ROOT.glob("*/*.py"):
        assert "datasets" not in {module.split(".")[0] for module in _imports(path)}, path
