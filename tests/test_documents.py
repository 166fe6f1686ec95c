"""What the pages say is so: trees, help, links, options, and examples, which run as they stand.

That the commands in them can be run is looked at in `test_commands.py`.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUESTIONS, ROOT
from PIL import Image

from bench import BenchConfig
from benchmark.answers import AnswersConfig
from benchmark.gpu import GpuBenchConfig
from calibration.config import CalibrateConfig
from export.calibration import CalibrationConfig
from export.comparison.config import CompareConfig
from export.config import ExportConfig
from qvl_batch.config import CaptionConfig
from qvl_batch.conversation import images_of
from qvl_batch.input.messages import read_messages

#: Every page, and what it says.
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md")])
    if path.parent.name != "build"
}
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
#: Pages that print the tree of their folder.
WITH_TREE = ("qvl_batch/README.md", "export/README.md", "jobs/README.md", "tests/README.md")
EXAMPLES = [(page, code) for page, text in PAGES.items() for _, kind, code in FENCED.findall(text) if kind == "python"]
#: Of the README, and of an example.
MOST_LINES, MOST_LINES_OF_EXAMPLE = 180, 35


def _tree(text):
    """Files of the printed tree of a page, each as its folder and its name; folders without a name in them too."""
    ((_, _, block),) = [block for block in FENCED.findall(text) if re.search(r"^[├└]── ", block[2], re.MULTILINE)]
    first, *lines = block.splitlines()
    folders = [first.split("/")[0]]
    for line in lines:
        indent, name = re.match(r"([│ ]*)[├└]── (\S+)", line).groups()
        del folders[len(indent) // 4 + 1 :]
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
        else:
            yield "/".join(folders), name


def _modules(folder):
    """Modules below a folder; of the tests, what is no test."""
    for path in (ROOT / folder).rglob("*.py"):
        if not path.name.startswith(("__", "test_")):
            yield str(path.parent.relative_to(ROOT)), path.name


@pytest.mark.parametrize("page", WITH_TREE)
def test_the_tree_in_a_page_is_the_tree(page):
    printed, found = list(_tree(PAGES[page])), set(_modules(page.split("/")[0]))
    assert len(printed) == len(set(printed))
    assert set(printed) == found


def test_trees_are_read_with_their_folders():
    lines = (
        "a/   of all",
        "├── x.py  one",
        "├── b/    room",
        "│   ├── y.py",
        "│   └── c/",
        "│       └── z.py",
        "└── d/",
    )
    tree = "\n".join(("```", *lines, "    └── y.py", "```\n"))
    assert list(_tree(tree)) == [("a", "x.py"), ("a/b", "y.py"), ("a/b/c", "z.py"), ("a/d", "y.py")]


def test_the_map_names_every_folder_that_is_there():
    named = set(re.findall(r"^(?:\| )?`?(\w+)/`? \|", PAGES["README.md"], re.MULTILINE))
    assert named == {path.parent.name for path in ROOT.glob("[!.]*/README.md") if path.parent.name != "build"}


def test_the_readme_is_read_in_one_sitting():
    assert len(PAGES["README.md"].splitlines()) <= MOST_LINES


def test_the_help_in_a_page_is_the_help():
    env = os.environ | {"COLUMNS": "100"}
    command = [sys.executable, "jobs/caption.py", "--help"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert result.stdout.strip() in PAGES["jobs/README.md"]


@pytest.fixture
def after_the_demo(tiny_bundle, tmp_path):
    """A folder as the project is after `make demo`, as far as examples need it, with a photo."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "tiny-bundle").symlink_to(tiny_bundle.path)
    (tmp_path / "datasets" / "demo").mkdir(parents=True)
    (tmp_path / "datasets" / "demo" / QUESTIONS.name).symlink_to(QUESTIONS)
    Image.new("RGB", (300, 200), "white").save(tmp_path / "photo.jpg")
    Image.new("RGB", (100, 420), "black").save(tmp_path / "other.png")
    return tmp_path


def _run_example(code, folder, env):
    """What an example prints."""
    (folder / "example.py").write_text(code)
    command, env = [sys.executable, "example.py"], env | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _example(page, word):
    (code,) = [code for where, code in EXAMPLES if where == page and word in code]
    assert len(code.splitlines()) <= MOST_LINES_OF_EXAMPLE
    return code


def test_every_example_is_one_that_is_run():
    # Those of the export are run by `test_native.py`, `test_tool_graphs.py` and `test_quantizers.py`.
    assert [page for page, _ in EXAMPLES] == ["README.md", *["export/README.md"] * 3, *["jobs/README.md"] * 3]


def test_the_notebook_example_runs(after_the_demo):
    assert _run_example(_example("README.md", "photo.jpg"), after_the_demo, dict(os.environ)).strip()


@pytest.mark.long
def test_the_example_of_a_folder_of_photos_answers_each_once(after_the_demo, ray_env):
    code = _example("jobs/README.md", "PHOTOS")
    said = _run_example(code, after_the_demo, ray_env)
    assert re.search(r"^rows      8 \(8 stop\)$", said, re.MULTILINE)
    assert re.search(r"^\d  scene-0003.jpeg +\d +stop +(None|NaN)$", said, re.MULTILINE)
    # Again, it finds nothing left to do.
    assert "8 rows are answered already, 0 are left" in _run_example(code, after_the_demo, ray_env)


def test_the_example_of_a_loop_sets_aside_what_failed(after_the_demo):
    said = _run_example(_example("jobs/README.md", "failures"), after_the_demo, dict(os.environ)).splitlines()
    assert len(said) == 9
    assert all(re.match(r"scene-\d{4}: \w+", line) for line in said[:8])
    assert said[8].startswith("broken failed in stage image: ")


def test_the_example_of_pairs_and_conversations_shows_images_at_their_own_size(after_the_demo, native_bundle):
    (after_the_demo / "build" / "native-bundle").symlink_to(native_bundle.path)
    said = _run_example(_example("jobs/README.md", "messages="), after_the_demo, dict(os.environ))
    assert re.findall(r"\(images seen: (.*)\)$", said, re.MULTILINE) == [
        "308 x 196, 112 x 420", "308 x 196", "308 x 196",
    ]  # fmt: skip


#: Conversations in a page: the values of the image column beside each, and how many images it shows.
CONVERSATIONS = ((["a", "b"], 2), ([], 1), (["a"], 1), ([], 0))


def test_the_conversations_in_a_page_are_read():
    blocks = [code for text in PAGES.values() for _, kind, code in FENCED.findall(text) if kind == "json"]
    rows = [line for block in blocks for line in block.splitlines()]
    for line, (column, images) in zip(rows, CONVERSATIONS, strict=True):
        asked = read_messages(line, column)
        assert len(asked.conversation) == len(json.loads(line))
        assert len(list(images_of(asked.conversation))) == len(asked.images) == images


def _prose(text):
    return FENCED.sub("", text)


def _links(text):
    return re.findall(r"\]\(([^()\s]+)\)", _prose(text))


def _anchors(text):
    """Of a page's headings, as they are made where it is shown."""
    headings = re.findall(r"^#+ (.+)$", _prose(text), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain]


LINKS = [(page, link) for page, text in PAGES.items() for link in _links(text) if "://" not in link]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_every_link_leads_somewhere(page, link):
    name, _, anchor = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    assert target.exists()
    if anchor:
        assert _anchors(target.read_text()).count(anchor) == 1


def test_links_and_anchors_are_found():
    page = "# A `b.py`, and *c*?\n\n```\n# no heading\n[x](y)\n```\n\n[![a](b.png)](c.md#d) [e](#a-bpy-and-c)\n"
    assert _anchors(page) == ["a-bpy-and-c"]
    assert _links(page) == ["b.png", "c.md#d", "#a-bpy-and-c"]


def test_every_page_can_be_reached_from_the_readme():
    reached, left = set(), ["README.md"]
    while left:
        page = left.pop()
        reached.add(page)
        found = [os.path.normpath(Path(page).parent / link.split("#")[0]) for where, link in LINKS if where == page]
        left += [name for name in found if name in PAGES and name not in reached]
    assert reached == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_that_a_page_names_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)\b(?!=)", PAGES[page], re.MULTILINE)) <= targets
    for path in re.findall(r"\b(?<!/)(?:jobs|datasets|export|tests|qvl_batch)/[\w/.-]+\.[a-z]+\b", PAGES[page]):
        assert (ROOT / path).exists(), path


#: Options of programs that are not ours.
OTHERS = {
    *("--working-dir", "--address", "--entrypoint-num-gpus", "--runtime-env"),  # Ray
    *("--id", "--query-gpu", "--format"),  # nvidia-smi
    "--help",
    *("--algorithm", "--precision"),  # Olive
}


def _options():
    """Of all our programs."""
    for config in (
        CaptionConfig,
        CalibrateConfig,
        CalibrationConfig,
        CompareConfig,
        ExportConfig,
        BenchConfig,
        GpuBenchConfig,
        AnswersConfig,
    ):
        for field in dataclasses.fields(config):
            name = field.name.replace("_", "-")
            yield from (f"--{name}", f"--no-{name}") if field.type is bool else (f"--{name}",)
    for path in (
        *ROOT.glob("datasets/*.py"),
        *(ROOT / "tests" / f"{name}.py" for name in ("fuzz", "real_size", "soak")),
    ):
        yield from re.findall(r"\.add_argument\(\s*\"(--[\w-]+)\"", path.read_text())


CODE = [path for folder in ("qvl_batch", "export", "jobs") for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("name", [*PAGES, *sorted(str(path.relative_to(ROOT)) for path in CODE)])
def test_options_named_in_texts_exist(name):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", (ROOT / name).read_text()))
    assert named <= {*_options(), *OTHERS}
