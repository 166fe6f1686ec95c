"""What the project says of itself is true."""

import ast
import re
import subprocess
import sys
import tomllib
from itertools import chain

import pytest
from conftest import QUESTIONS, ROOT

import qvl_batch
from qvl_batch import errors

WORKER = ROOT / "qvl_batch"


def _imports(path):
    """Modules that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


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
        ("ray", {"pipeline/actors", "pipeline/cluster", "pipeline/dataset", "pipeline/metrics", "pipeline/pool"}),
        ("onnxruntime", {"runtime/devices", "runtime/session"}),
        ("pynvml", {"pipeline/capacity"}),
        ("fsspec", {"input/download", "output/object_store", "stores"}),
        ("deltalake", {"input/tables"}),
        ("torch", set()),
        ("onnx", set()),
        ("transformers", set()),
        ("tokenizers", {"decoder/prompts"}),
        ("pillow_heif", {"images/formats"}),
    ],
)
def test_a_library_is_met_in_one_place(library, modules):
    files = {path: str(path.relative_to(WORKER).with_suffix("")) for path in WORKER.rglob("*.py")}
    found = {name for path, name in files.items() if library in {m.split(".")[0] for m in _imports(path)}}
    assert found == modules


def test_what_worker_and_exporter_read_is_installed_with_them():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {f"{package.replace('.', '/')}/{name}" for package, names in packages.items() for name in names}
    paths = chain(WORKER.rglob("*"), (ROOT / "export").rglob("*"))
    files = (path for path in paths if path.is_file() and "__pycache__" not in path.parts)
    found = {str(path.relative_to(ROOT)) for path in files if path.suffix not in (".py", ".md")}
    assert installed == found > {"qvl_batch/py.typed", "export/py.typed"}


def test_tasks_that_only_read_and_decode_import_no_heavy_library():
    heavy = {"transformers", "onnxruntime", "ray"}
    script = f"import sys, qvl_batch.pipeline.prepare; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names():
    names = {"Answer", "Box", "Bundle", "Captioner", "Failure", "ImageSize", "JobError", "QvlBatchError", "RowError"}
    names.add("boxes")
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
