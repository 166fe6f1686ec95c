"""Every command that a page, a docstring or the Makefile names can be run, and there is a test that runs it.

`documented` lists them. Each line is parsed by the program that it calls, and `TESTS` says what runs that
program, in small where it takes long.
"""

import argparse
import ast
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import metadata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import tyro
from conftest import CONVERSATIONS, QUESTIONS, ROOT, SCENES, TINY, TRACES
from packaging.requirements import Requirement
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

from export.package import export_bundle
from qvl_batch.bundle.loading import Bundle

HERE = Path(__file__).name
#: Tests that run a program: of this file, or of another one, where the program is named.
TESTS = {
    "make demo": ["test_the_demo_answers_and_shows"],
    "make test": ["test_the_machine_that_checks_all_runs_lint_and_tests"],
    "make test-long": ["test_tests_are_chosen_by_marks_that_exist"],
    "make lint": ["test_the_machine_that_checks_all_runs_lint_and_tests"],
    "make soak": ["test_the_soak_kills_once"],
    "make fuzz": ["test_the_fuzz_damages_a_few_images"],
    "make real-size": ["test_an_export_of_real_size_is_tried_at_tiny_size"],
    "make compare": ["test_the_comparison_compares_some_rows"],
    "make bench": ["test_the_bench_measures_two_rows"],
    "make bench-answers": ["test_the_bench_measures_kinds_of_answers_alone"],
    "make openvino": ["test_what_openvino_is_installed_from_can_be_read"],
    "make train": ["test_training_goes_on_where_it_was"],
    "make clean": ["test_clean_removes_what_was_built_and_nothing_else"],
    "make browser": ["test_what_tests_need_is_installed_where_it_is_not"],
    "make quantizers": ["test_quantizers.py::test_olive_takes_the_plain_graph"],
    "make emulator": ["test_what_tests_need_is_installed_where_it_is_not"],
    ".ci/run": ["test_the_machine_that_checks_all_runs_lint_and_tests"],
    "python -m export": [
        "test_the_demo_exports_its_bundles",
        "test_recipe.py::test_the_bundle_is_what_was_chosen",
        "test_recipe.py::test_a_saved_recipe_makes_the_same_weights_again",
        "test_adapter.py::test_a_bundle_names_its_adapter_and_passes_the_gate",
        "test_quantized_files.py::test_a_bundle_of_the_checkpoints_integers_answers_as_its_weights_do",
    ],
    "python -m export.calibration": ["test_tool_graphs.py::test_a_day_with_tools_that_quantize_runs_as_the_page_says"],
    "python compress.py": ["test_quantizers.py::test_neural_compressor_takes_the_plain_graph"],
    "python quantize.py": ["test_tool_graphs.py::test_a_day_with_tools_that_quantize_runs_as_the_page_says"],
    "python jobs/caption.py": [
        "test_the_demo_answers_and_shows",
        "test_job_containers.py::test_rows_of_every_kind_are_answered_and_a_job_goes_on",
        "test_forecast_job.py::test_a_forecast_holds_what_the_job_then_needs_and_writes_two_files",
    ],
    "python jobs/check.py": ["test_known_answers.py::test_check_is_a_command"],
    "python jobs/show.py": ["test_the_demo_answers_and_shows"],
    "python jobs/calibrate.py": ["test_calibrate.py::test_the_command_finds_the_threshold_and_says_what_it_covers"],
    "python jobs/compare.py": ["test_the_comparison_compares_some_rows"],
    "python jobs/bench.py": [
        "test_the_bench_measures_two_rows",
        "test_the_bench_measures_kinds_of_answers_alone",
        "test_bench.py::test_without_a_gpu_nothing_is_made_for_one",
        "test_bench.py::test_the_bench_for_a_gpu_runs_on_whatever_the_bundle_is_for",
    ],
    "python datasets/train.py": ["test_training_goes_on_where_it_was"],
    "python datasets/make_model.py": ["test_a_model_is_made_up"],
    "python datasets/evaluate.py": ["test_a_checkpoint_is_asked_about_new_scenes"],
    "python datasets/make_demo.py": ["test_the_demo_is_made_by_its_script"],
    "python datasets/build_tokenizer.py": ["test_the_tokenizer_is_made_by_its_script"],
    "python tests/soak.py": ["test_the_soak_kills_once"],
    "python tests/fuzz.py": ["test_the_fuzz_damages_a_few_images"],
    "python tests/real_size.py": ["test_an_export_of_real_size_is_tried_at_tiny_size"],
    "python by_hand.py": ["test_native.py::test_the_plain_graphs_run_by_hand_as_the_page_says"],
    "python -m pytest": ["test_tests_are_chosen_by_marks_that_exist"],
    "pip install": ["test_what_pip_is_to_install_exists"],
    "ray job submit": [
        "test_job.py::test_a_job_submitted_to_a_cluster_answers_all_rows_but_those_that_end_its_workers",
        "test_job.py::test_a_cluster_with_nothing_but_ray_answers_with_bundle_and_input_in_a_store",
    ],
}
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "qvl_batch/README.md",
    "export/README.md",
    "jobs/README.md",
    "datasets/README.md",
    "tests/README.md",
)
SCRIPTS = sorted(path for folder in ("jobs", "datasets", "tests") for path in ROOT.glob(f"{folder}/*.py"))
#: What a line of a command begins with, and what a block of anything else does.
LAUNCHERS = ("make", "python", "pip", "ray", ".ci/run")
OTHERS = (
    *("rows", "machine", "equal", "usage:", "head_ids"),
    *("checkpoint", "row", "DIR/part-*.parquet"),
    *("qvl_batch/", "export/", "jobs/", "tests/"),
)
#: Lines of the Makefile that are no programs of ours.
TOOLS = ("rm", "test", "touch", "command", "ruff", "hadolint", "mypy", "lint-imports", "optimum-cli", "python3")


def _words(line):
    """Words of a command, without variables of its environment and what stands for more of it."""
    words = shlex.split(line)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words


def _is_command(text):
    return re.match(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(map(re.escape, LAUNCHERS))})(?: \S|$)", text) is not None


def _in_blocks(name):
    """Lines of commands in the blocks of a page, of which each holds commands or something that is known."""
    text = (ROOT / name).read_text()
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    plain = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks += [("", block) for block in re.findall(r"(?:^    \S.*\n)+", plain, re.MULTILINE)]
    for kind, block in blocks:
        lines = [line for line in map(_joined, block.replace("\\\n", " ").splitlines()) if line]
        if kind not in ("python", "json", "ini") and lines[0].split()[0] not in OTHERS:
            yield from (line.split(" # ")[0] for line in lines)


def _in_sentences(name):
    """Commands, or what they begin with."""
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    yield from (text for text in re.findall(r"`([^`\n]+)`", text) if _is_command(text))


def _joined(line):
    return " ".join(line.split())


def _in_docstring(path):
    lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    yield from (re.sub(r"[\[\]]", "", line.strip()) for line in lines if _is_command(line.strip()))


def _recipe(target, **variables):
    """Commands of a target and of what it is made of, as if nothing were there but what installs the rest."""
    given = {"BIN": "BIN", "PYTHON": "python3", "BUNDLE": "BUNDLE", "BENCH": "BENCH", "OPENVINO": "OPENVINO"}
    given |= {"READY": ".nothing"} | variables
    options = [f"{name}={value}" for name, value in given.items()]
    result = _make("--dry-run", "--old-file=.nothing", target, *options)
    return [_joined(line) for line in result.stdout.replace("\\\n", " ").splitlines()]


def _make(*options, cwd=ROOT, env=None, check=True):
    env = {name: value for name, value in (env or os.environ).items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = [shutil.which("make"), "--no-print-directory", *map(str, options)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=check, timeout=600)


def whole_lines():
    """Commands that are there with all their options: where, and the line."""
    found = [(name, line) for name in PAGES for line in _in_blocks(name)]
    found += [(str(path.relative_to(ROOT)), line) for path in SCRIPTS for line in _in_docstring(path)]
    found += [
        ("Makefile", line.replace("BIN/", "")) for target in TARGETS for line in _recipe(target) if "BIN/" in line
    ]
    found += [(where, line.split(" -- ")[1]) for where, line in found if " -- " in line]
    return list(dict.fromkeys(found))


def documented():
    """Every command that is named anywhere: where, and the line, or what it begins with."""
    found = whole_lines() + [(name, line) for name in PAGES for line in _in_sentences(name)]
    return list(dict.fromkeys(found + [("Makefile", f"make {target}") for target in TARGETS]))


def _programs(line):
    """What a line runs, by the names of `TESTS`."""
    words = _words(line)
    match words:
        case ["make", *rest]:
            return [f"make {word}" for word in rest if "=" not in word and not word.startswith("-")]
        case ["python", "-m", module, *_]:
            return [f"python -m {module}"]
        case ["python" | "pip", what, *_]:
            return [f"{words[0]} {what}"]
        case ["ray", *_]:
            return ["ray job submit"]
    return [words[0]]


TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
DOCUMENTED = documented()


@pytest.mark.parametrize(("where", "line"), DOCUMENTED)
def test_every_documented_command_has_a_test_that_runs_it(where, line):
    for program in _programs(line):
        if program.split()[0] in TOOLS:
            continue
        assert program in TESTS, f"{where}: `{line}` is run by no test; write one, and name it in {HERE}"


def test_every_page_is_looked_through():
    pages = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md")]}
    assert set(PAGES) == pages - {"CHANGELOG.md"}


def test_commands_are_found_wherever_a_page_has_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Try `make it ARGS='-x'`, `python -m export` or `rows`.\n\n```\nmake demo   # which shows\n"
        "python jobs/new.py IN \\\n    --out OUT\n```\n\n```\nrows      64\n```\n\n```python\nimport sys\n```\n\n"
        "```json\n[]\n```\n\n"
        "1. First\n\n   ```\n   pip install .\n   ```\n\nor\n\n    ./new --fast\n\nand `curl x`.\n"
    )
    blocks = ["make demo", "python jobs/new.py IN --out OUT", "pip install .", "./new --fast"]
    assert list(_in_blocks(page)) == blocks
    assert list(_in_sentences(page)) == ["make it ARGS='-x'", "python -m export"]
    assert [_programs(line) for line in (*blocks, "make it ARGS='-x' demo")] == [
        ["make demo"], ["python jobs/new.py"], ["pip install"], ["./new"], ["make it", "make demo"],
    ]  # fmt: skip
    assert {"python jobs/new.py", "./new", "make it"}.isdisjoint(TESTS)


def test_what_is_said_to_run_a_program_is_a_test_that_names_it():
    programs = {program for _, line in DOCUMENTED for program in _programs(line)}
    assert set(TESTS) <= programs, "these are not documented any more"
    for program, nodes in TESTS.items():
        for node in nodes:
            name, _, test = node.rpartition("::")
            text = (ROOT / "tests" / (name or HERE)).read_text()
            assert re.search(rf"^def {test}\(", text, re.MULTILINE), f"{program}: there is no {node}"
            assert not name or re.search(rf"\b{Path(program.split()[-1]).stem}\b", text), f"{node} has no {program}"


class _Parsed(BaseException):
    """A program took its options."""


@pytest.fixture
def only_parse(monkeypatch):
    """Programs end when they have parsed their options."""
    for owner, name in ((tyro, "cli"), (argparse.ArgumentParser, "parse_args")):
        real = getattr(owner, name)

        def parsed(*arguments, real=real, **options):
            raise _Parsed(real(*arguments, **options))

        monkeypatch.setattr(owner, name, parsed)


@pytest.fixture
def run_here(monkeypatch):
    """Runs a command of ours in this process, which has its libraries already, and gives its exit status."""

    def run(line):
        _, *words = _words(line)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        try:
            if words[0] == "-m":
                monkeypatch.delitem(sys.modules, words[1], raising=False)  # as in a process of its own
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
        return 0

    return run


OURS = [each for each in whole_lines() if re.match(r"python (-m export|jobs/|datasets/|tests/)", each[1])]


@pytest.mark.usefixtures("only_parse")
@pytest.mark.parametrize("line", sorted({line for _, line in OURS}))
def test_every_documented_command_line_is_one_that_its_program_takes(line, run_here, in_a_folder):
    python = in_a_folder / "build" / "openvino" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    with pytest.raises(_Parsed):
        run_here(line)


@pytest.mark.usefixtures("only_parse")
def test_a_command_line_that_its_program_does_not_take_is_noticed(run_here):
    for line in ("python jobs/show.py ANSWERS --row 20", "python tests/fuzz.py --image=x", "python -m export A B"):
        try:
            status = run_here(line)
        except _Parsed:
            pytest.fail(f"{line} was taken")
        assert status == 2


@pytest.mark.parametrize(
    "program", ["-m export", "-m export.calibration", *(f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py"))]
)
def test_every_command_has_help(program, run_here, capsys):
    assert run_here(f"python {program} --help") == 0
    assert "usage:" in capsys.readouterr().out


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    """Where nothing is, so that a command leaves nothing in the project."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def two_rows(tmp_path):
    """The first two demo questions."""
    return _some_rows(tmp_path / "questions.parquet", QUESTIONS, 2)


@pytest.fixture
def six_conversations(tmp_path):
    """The first six rows of the demo of conversations."""
    return _some_rows(tmp_path / "conversations.parquet", CONVERSATIONS, 6)


@pytest.fixture
def three_scenes(tmp_path):
    """The first three rows of the demo of JSON."""
    return _some_rows(tmp_path / "scenes.parquet", SCENES, 3)


def _some_rows(path, source, count):
    pq.write_table(pq.read_table(source).slice(0, count), path)
    return path


def _run_target(target, tmp_path, bundle=None, env=None, native=None, **variables):
    """Run a target as make does, with this environment in place of one that it would install."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (programs / "python").chmod(0o755)
    bundles = {name: each.path for name, each in (("BUNDLE", bundle), ("NATIVE", native)) if each}
    given = {"BIN": programs, "READY": "ready"} | bundles | variables
    there = ["ready", *(f"{path}/bundle.json" for path in bundles.values())]
    options = [*(f"--old-file={name}" for name in there), *(f"{name}={value}" for name, value in given.items())]
    return _make(target, *options, env=(env or os.environ) | {"PYTHONPATH": str(ROOT)})


def _small(target, arguments="", **variables):
    """The command line of a target that is its own, with further arguments."""
    lines = _recipe(target, ARGS=arguments, **{name: str(value) for name, value in variables.items()})
    return [line.replace("BIN/", "") for line in lines if line.startswith("BIN/python")]


@pytest.mark.long
def test_the_demo_answers_and_shows(
    tiny_bundle, native_bundle, two_rows, six_conversations, three_scenes, ray_env, tmp_path
):
    given = {"QUESTIONS": two_rows, "CONVERSATIONS": six_conversations, "SCENES": three_scenes}
    given["ANSWERS"] = tmp_path / "answers"
    result = _run_target("demo", tmp_path, tiny_bundle, ray_env, native_bundle, **given)
    for rows in (2, 6, 3):
        assert f"rows      {rows} ({rows} stop)\nerrors    0\n" in result.stdout
        right = re.search(rf"^(\d) of {rows} answers match what was expected", result.stdout, re.MULTILINE)
        assert int(right[1]) >= rows - 1
    for name in ("count", "leftmost", "color", "star"):
        assert re.search(rf"of 3, right in .*\b{name} [23]\b", result.stdout)
    # As the README shows it.
    figures = re.search(r"^rows      64 .*?^answers ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    shown = re.search(r"^rows      2 .*?^answers ", result.stdout, re.DOTALL | re.MULTILINE)[0]
    assert [line[:10] for line in shown.splitlines()] == [line[:10] for line in figures.splitlines()]


def test_the_demo_exports_its_bundles(run_here, in_a_folder, monkeypatch, capsys):
    square, native, *_ = _small("demo", BUNDLE=in_a_folder / "square", NATIVE=in_a_folder / "native", TINY=TINY)
    # As the bundles that tests share were made, whose gate they passed.
    quick = lambda config, progress: export_bundle(replace(config, skip_parity=True), progress, traces=TRACES)  # noqa: E731
    monkeypatch.setattr("export.package.export_bundle", quick)
    for line, name, is_native in ((square, "square", False), (native, "native", True)):
        assert line.startswith("python -m export ")
        assert run_here(line) == 0
        assert f"{in_a_folder}/{name}: " in capsys.readouterr().out
        assert Bundle.load(in_a_folder / name).manifest.layout.resolution.is_native == is_native


def test_the_comparison_compares_some_rows(
    tiny_bundle, native_bundle, two_rows, six_conversations, run_here, in_a_folder, capsys
):
    bundles = {"BUNDLE": tiny_bundle.path, "NATIVE": native_bundle.path}
    rows = {"QUESTIONS": two_rows, "CONVERSATIONS": six_conversations}
    *_, square, native = _small("compare", TINY=TINY, COMPARISON=in_a_folder, **bundles, **rows)
    for line, name, count in ((square, "squares", 2), (native, "native", 6)):
        assert run_here(line) == 0
        assert f"equal     {count} of {count} answers" in capsys.readouterr().out
        assert {path.name for path in (in_a_folder / name).iterdir()} >= {
            "report.html", "comparison.parquet", "summary.json"
        }  # fmt: skip


@pytest.mark.long
def test_the_bench_measures_two_rows(tiny_bundle, native_bundle, run_here, in_a_folder, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # threads of peers that wait for each other take half of the time
    small = "--rows 2 --rounds 1 --new-tokens 2 --ray-rows 0 --no-situations"
    *_, line = _small("bench", small, BENCH=in_a_folder)
    bundles = dict.fromkeys(("fp32", "int8", "vocabulary"), tiny_bundle.path) | {"native": native_bundle.path}
    for name, target in (bundles | {"model": TINY}).items():
        (in_a_folder / name).symlink_to(target)
    assert run_here(line) == 0
    figures = json.loads((in_a_folder / "bench.json").read_text())
    own = {"native_over_fixed", "mixed_over_fixed", "hf_mixed", "guided", "choices", "confidence", "four_samples"}
    assert set(figures["ratios"]) == {"hf_fp32", "hf", "vision_peak", "prefill_peak", "decode_bandwidth"} | own
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    assert set(figures["answers_equal_to_fp32"]) == {
        "qvl-batch fp32", "qvl-batch reduced", "transformers fp32", "transformers bf16"
    }  # fmt: skip
    assert figures["answers_equal_to_fp32"]["qvl-batch fp32"] == [2, 2]
    assert f"written to {in_a_folder}" in capsys.readouterr().out


def test_the_bench_measures_kinds_of_answers_alone(tiny_bundle, run_here, in_a_folder, capsys):
    (in_a_folder / "vocabulary").symlink_to(tiny_bundle.path)
    *_, line = _small("bench-answers", "--rows 3 --rounds 1 --slots 2", BENCH=in_a_folder)
    assert run_here(line) == 0
    figures = json.loads((in_a_folder / "answers" / "bench.json").read_text())
    assert set(figures["ratios"]) == {"guided", "choices", "confidence", "four_samples"}
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    assert figures["answers"]["choices"]["tokens"] == 1
    assert set(figures["answers"]["steps"]) == {
        "rows", "free_ms", "guided_ms", "logprobs_ms", "mask_us", "accept_us"
    }  # fmt: skip
    assert f"written to {in_a_folder / 'answers'}" in capsys.readouterr().out


def test_the_bench_makes_its_models_and_exports_them():
    made = [line for line in _small("bench") if "jobs/bench.py" not in line]
    assert made == [
        "python datasets/make_model.py BENCH/model",
        *(
            f"python -m export BENCH/model --output BENCH/{kind} --dtype {kind} --overwrite"
            for kind in ("fp32", "int8")
        ),
        "python -m export BENCH/model --output BENCH/native --image-size native --overwrite",
        "python datasets/make_model.py BENCH/vocabulary-model --shape vocabulary",
        "python -m export BENCH/vocabulary-model --output BENCH/vocabulary --overwrite",
    ]


def test_a_model_is_made_up(run_here, in_a_folder, capsys):
    assert run_here("python datasets/make_model.py model --shape tiny") == 0
    assert re.fullmatch(r"1,\d{3},\d{3} parameters\n", capsys.readouterr().out)
    assert (in_a_folder / "model" / "config.json").is_file()


@pytest.mark.usefixtures("in_a_folder")
def test_the_fuzz_damages_a_few_images(run_here, capsys):
    (line,) = _small("fuzz", "--images 5")
    assert run_here(line) == 0
    assert "5 damaged images" in capsys.readouterr().out


@pytest.mark.long
def test_training_goes_on_where_it_was(run_here, in_a_folder, monkeypatch, capsys):
    # The script puts its own there, and seeds torch.
    monkeypatch.setattr(Qwen2_5_VLVisionAttention, "forward", Qwen2_5_VLVisionAttention.forward)
    weights, output = in_a_folder / "work" / "state.pt", in_a_folder / "out" / "model.safetensors"
    found = []
    with torch.random.fork_rng():
        for steps in ((1, 0, 0), (1, 1, 0)):
            small = "--images 2 --steps-224 {} --steps-672 {} --steps-native {}".format(*steps)
            (line,) = _small("train", small, TINY=output.parent, TRAINING=weights.parent)
            assert run_here(line) == 0
            found.append((torch.load(weights)["step"], "step 0 224px loss" in capsys.readouterr().out))
            assert output.stat().st_size == (TINY / "model.safetensors").stat().st_size
    assert found == [(1, True), (2, False)]


def test_a_checkpoint_is_asked_about_new_scenes(run_here, capsys):
    assert run_here(f"python datasets/evaluate.py {TINY} --rows 2 --styles fixed pairs json") == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+) +all \d of 2$", printed, re.MULTILINE) == ["fixed", "pairs", "json"]
    assert re.findall(r"^(\w+) +field +count 2 of 2, ", printed, re.MULTILINE) == ["json"]


@pytest.mark.usefixtures("in_a_folder")
def test_the_demo_is_made_by_its_script(run_here):
    assert run_here("python datasets/make_demo.py few.parquet --rows 2 --seed 7") == 0
    assert pq.read_table("few.parquet").equals(pq.read_table(QUESTIONS).slice(0, 2))
    assert run_here("python datasets/make_demo.py all.parquet --rows 40 --style mixed") == 0
    assert pq.read_table("all.parquet").equals(pq.read_table(CONVERSATIONS))
    assert run_here("python datasets/make_demo.py scenes.parquet --rows 24 --style json") == 0
    assert pq.read_table("scenes.parquet").equals(pq.read_table(SCENES))


def test_the_tokenizer_is_made_by_its_script(run_here, in_a_folder):
    assert run_here("python datasets/build_tokenizer.py tokenizer") == 0
    for path in (in_a_folder / "tokenizer").iterdir():
        assert path.read_bytes() == (TINY / path.name).read_bytes(), path.name


@pytest.mark.long
def test_the_soak_kills_once(tiny_bundle, tmp_path):
    result = _run_target("soak", tmp_path, tiny_bundle, ARGS="--kills 1 --latest 4")
    assert re.search(r"^1 kills \(.*: 128 rows, 0 missing, 0 twice, 0 with another", result.stdout, re.MULTILINE)


@pytest.mark.long
def test_an_export_of_real_size_is_tried_at_tiny_size(tmp_path):
    small = f"--shape tiny --image-size native --on-paper tiny --most 1000 --work-dir {tmp_path}/work"
    result = _run_target("real-size", tmp_path, ARGS=small)
    assert "tiny on paper: 0.0 G parameters, 0 of another shape" in result.stdout
    assert Bundle.load(tmp_path / "work" / "tiny-fp32-native").manifest.parity


def test_the_machine_that_checks_all_runs_lint_and_tests():
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert script.index("make lint") < script.index("make test")
    tools = {"ruff", "hadolint", "mypy", "lint-imports"}
    assert {_words(line)[0] for line in _recipe("lint")} == {f"BIN/{tool}" for tool in tools}
    for tool in tools:
        assert shutil.which(tool, path=Path(sys.executable).parent), f"{tool} is not installed with the extra dev"


def test_tests_are_chosen_by_marks_that_exist():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    marks = {mark.split(":")[0] for mark in settings["markers"]}
    lines = [line for _, line in DOCUMENTED if line.startswith("python -m pytest")]
    assert {word for line in lines for word in re.findall(r"(?<= -m )(?!pytest)\w+", line)} <= marks
    assert len(lines) >= 3


def test_clean_removes_what_was_built_and_nothing_else(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("build/a", ".venv/b", "answers/c"):
        (tmp_path / name).mkdir(parents=True)
    _make("clean", cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"Makefile", "answers"}


@pytest.mark.parametrize(
    ("target", "needed", "installed"),
    [
        ("browser", 2, ()),
        ("browser", 2, ("chromium",)),
        ("browser", 2, ("chromium", "chromedriver")),
        ("emulator", 1, ()),
        ("emulator", 1, ("qemu-x86_64",)),
    ],
)
def test_what_tests_need_is_installed_where_it_is_not(target, needed, installed, tmp_path):
    for name in (*installed, "apt-get"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho $0 $@ >> {tmp_path}/called; exit 1\n")
        (tmp_path / name).chmod(0o755)
    result = _make(target, env=os.environ | {"PATH": str(tmp_path)})
    assert ("can't be installed here" in result.stdout) == (len(installed) < needed)
    assert (tmp_path / "called").exists() == (len(installed) < needed)


def test_a_python_that_is_too_old_is_named_before_anything_is_installed(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old"
    old.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 10, 0)\nexec(sys.argv[2])\n")
    old.chmod(0o755)
    result = _make(f"PYTHON={old}", "demo", cwd=tmp_path, check=False)
    assert result.returncode
    assert "Python 3.11 or 3.12 is needed, this is 3.10: make PYTHON=python3.12" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_what_openvino_is_installed_from_can_be_read():
    lines = _recipe("openvino")
    (torch_line,) = [line for line in lines if "torch==" in line]
    (given,) = re.findall(r"torch==[\d.]+", torch_line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (ours,) = [Requirement(each) for each in project["export"] if each.startswith("torch")]
    assert ours.specifier.contains(given.removeprefix("torch=="))
    (install,) = [line for line in lines if "--requirement" in line]
    named = (ROOT / install.split()[-1]).read_text().splitlines()
    packages = {Requirement(line).name for line in named if line and not line.startswith("#")}
    assert {"optimum-intel", "openvino-genai"} <= packages
    exports = [line for line in lines if "optimum-cli" in line]
    assert [line.split()[-1] for line in exports] == ["OPENVINO/model", "OPENVINO/vocabulary-model"]
    assert all(" --weight-format fp32 " in line for line in exports)


PIP = sorted({line for _, line in DOCUMENTED if line.startswith("pip install")})


@pytest.mark.parametrize("line", PIP)
def test_what_pip_is_to_install_exists(line):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for what in _words(line)[2:]:
        name, asked = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?", what).groups()
        known = extras if name == "." else metadata(name).get_all("Provides-Extra")
        assert set(asked.split(",") if asked else ()) <= set(known), what
