"""The files that bring a job to a cluster fit the project: versions, paths, options, and what a node installs."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro
import yaml
from conftest import ROOT
from test_documents import PAGES

from qvl_batch.config import CaptionConfig

LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
DOCKERFILE, KUBERAY = (ROOT / "jobs" / name for name in ("Dockerfile", "kuberay.yaml"))
ENVIRONMENT = ROOT / "jobs" / "runtime-env.yaml"


@pytest.fixture(scope="module")
def job():
    return yaml.safe_load(KUBERAY.read_text())["spec"]


def test_the_dockerfile_has_no_fault_and_copies_what_there_is():
    command = [Path(sys.executable).parent / "hadolint", DOCKERFILE]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert {"qvl_batch", "jobs", "pyproject.toml", "requirements.lock"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_images_and_clusters_have_the_ray_of_the_lock(job):
    (base,) = re.findall(r"^ARG BASE=rayproject/ray:([\d.]+)-py3(?:11|12)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert base == job["rayClusterSpec"]["rayVersion"] == LOCK["ray"]


def test_what_a_node_installs_has_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", each)[0].lower() for each in project["dependencies"]}
    assert names.isdisjoint({"torch", "transformers", "onnx"})
    assert {
        name for name in names if name.replace("_", "-") not in {n.lower().replace("_", "-") for n in LOCK}
    } == set()
    installed = yaml.safe_load(ENVIRONMENT.read_text())["pip"]["packages"][-1]
    assert re.findall(r"\[.*", installed) == ["[s3]"]  # no other extras
    assert "ARG STORES=s3\n" in DOCKERFILE.read_text()


def test_the_job_on_kubernetes_is_one_that_the_command_line_takes(job):
    python, script, *options = shlex.split(job["entrypoint"])
    assert (python, script) == ("python", "/home/ray/qvl-batch/jobs/caption.py")
    config = tyro.cli(CaptionConfig, args=options, config=(tyro.conf.FlagCreatePairsOff,))
    assert config.bundle.startswith("s3://")
    assert "WORKDIR /home/ray/qvl-batch\n" in DOCKERFILE.read_text()
    cpu, gpu = job["rayClusterSpec"]["workerGroupSpecs"]
    for group in (cpu, gpu):
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["tolerations"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (group is gpu)
    assert "tolerations" not in job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert job["rayClusterSpec"]["enableInTreeAutoscaling"]


@pytest.mark.parametrize("name", ["runtime-env.yaml", "kuberay.yaml", "Dockerfile"])
def test_pages_explain_each_file(name):
    assert f"jobs/{name}" in PAGES["jobs/README.md"]
