"""What pip installs is the worker and the exporter, whole, and answers without a checkout and without torch."""

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email import message_from_bytes

import pytest
from conftest import QUESTIONS, ROOT

PACKAGES = ("export", "qvl_batch")


def _pip(python, *options):
    command = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", *options]
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project's wheel, built of a copy: in the project, setuptools would leave its folders, and take from them
    what an earlier build left there.
    """
    source = tmp_path_factory.mktemp("project") / "source"
    what_is_made = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=what_is_made)
    _pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source.parent, source)
    (built,) = source.parent.glob("*.whl")
    return built


def test_the_wheel_has_all_modules_and_data_of_the_packages_and_nothing_else(wheel):
    wanted = set()
    for package in PACKAGES:
        files = (path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        wanted |= {str(path.relative_to(ROOT)) for path in files if path.suffix != ".md"}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(wanted)
    assert wanted > {"qvl_batch/py.typed", "qvl_batch/report/page.html.jinja", "export/py.typed"}


def test_the_wheel_is_described_by_the_readme_and_has_the_license(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        described = message_from_bytes(archive.read(name))
        (license_,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert archive.read(license_) == (ROOT / "LICENSE").read_bytes()
    assert described["Description-Content-Type"] == "text/markdown"
    assert described.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text().strip()
    plain = [each for each in described.get_all("Requires-Dist") if "extra ==" not in each]
    assert not {"torch", "transformers"} & {re.match(r"[\w-]+", each)[0] for each in plain}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a program in an environment where pip has installed the wheel alone, from a folder of its own."""
    environment, folder = tmp_path_factory.mktemp("installed") / "venv", tmp_path_factory.mktemp("elsewhere")
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    _pip(python, "install", "--constraint", ROOT / "requirements.lock", wheel)

    def run(code):
        command, env = [python, "-c", code], {"PATH": str(python.parent), "HOME": str(folder)}
        return subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True)

    return run


@pytest.mark.long
def test_what_the_wheel_installs_answers_as_expected(installed, tiny_bundle):
    row = f"pyarrow.parquet.read_table({str(QUESTIONS)!r}).slice(0, 1).to_pylist()[0]"
    done = installed(f"""if True:
        import pyarrow.parquet
        from qvl_batch import Captioner
        row = {row}
        with Captioner({str(tiny_bundle.path)!r}) as captioner:
            (answer,) = captioner.caption([row["image"]["bytes"]], [row["prompt"]])
        print(answer.finish_reason, answer.answer == row["expected"])""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["stop", "True"]


@pytest.mark.long
def test_what_the_wheel_installs_has_every_module_that_a_job_needs(installed):
    paths = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / "qvl_batch").rglob("*.py"))
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    assert "qvl_batch.pipeline.run" in modules
    done = installed(f"""if True:
        from importlib import import_module
        for name in {modules}:
            print(import_module(name).__file__)""")
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert len(files) == len(modules)
    assert all("/site-packages/qvl_batch/" in file and not file.startswith(f"{ROOT}/") for file in files)


@pytest.mark.long
def test_what_the_wheel_installs_is_without_torch(installed):
    for name in ("torch", "transformers", "onnx"):
        result = installed(f"import {name}")
        assert result.returncode == 1
        assert f"No module named '{name}'" in result.stderr
