"""The precision of each part is chosen by measuring: the bound holds, at less cost than with one precision."""

import json
import math
import re
import shlex

import numpy as np
import pytest
from browser import complaints, set_screen, show
from conftest import QUESTIONS, ROOT, TINY, TRACES
from selenium.webdriver.common.by import By

from export.command import work
from export.comparison.config import CompareConfig
from export.comparison.layers import Drift
from export.comparison.run import compare
from export.config import ExportConfig
from export.disk import Disk
from export.package import export_bundle
from export.recipe.choice import Option, path
from export.recipe.cost import REST, bytes_by_part, seconds_by_part
from export.recipe.page import render
from export.recipe.record import PAGE, RECIPE
from export.recipe.reference import Reference, side_of
from export.recipe.search import CANDIDATES, precision_of
from export.recipe.sensitivity import Sensitivity
from export.recipe.trial import Goal, Trial, cheapest, measure
from export.sample import SampleRow
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, INTEGERS, VISION, part_names
from qvl_batch.captioner import Captioner
from qvl_batch.errors import JobError

MAX_DRIFT, ROWS = 0.05, 8


def _export(output, **options):
    config = {"image_size": 224, "sample": QUESTIONS, "sample_rows": ROWS} | options
    export_bundle(ExportConfig(checkpoint=TINY, output=output, **config), traces=TRACES)
    return Bundle.load(output)


def _run(number, folder, more):
    """Run a command of the page in a folder."""
    section = (ROOT / "export" / "README.md").read_text().partition("### A recipe found by measuring")[2]
    command = re.findall(r"^    python -m export (.*)", section, re.MULTILINE)[number]
    for name, target in (("CHECKPOINT", TINY), ("TUNED", TINY), ("sample.parquet", QUESTIONS)):
        if not (folder / name).exists():
            (folder / name).symlink_to(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["export", *shlex.split(command), *shlex.split(more)])
        patch.setattr("export.package.Traces", lambda: TRACES)
        assert work() == 0


@pytest.fixture(scope="module", params=[pytest.param("found", marks=pytest.mark.long)])
def found(tmp_path_factory):
    """A bundle whose recipe was found, which takes half a minute."""
    folder = tmp_path_factory.mktemp("recipe")
    _run(0, folder, f"--image-size 224 --sample-rows {ROWS} --with-fp32")
    return Bundle.load(folder / "worker")


@pytest.fixture(scope="module")
def record(found):
    """What its recipe says."""
    return json.loads((found.path / RECIPE).read_text())


@pytest.mark.parametrize("seed", range(5))
def test_the_way_has_the_best_choice_for_every_price_of_error(seed):
    chance = np.random.default_rng(seed)
    options = {
        f"part {k}": [Option(dtype, *chance.random(2)) for dtype in INTEGERS]
        + [Option("fp32", chance.random() + 0.5, 0)]
        for k in range(6)
    }
    known = {(part, each.dtype): each for part, several in options.items() for each in several}
    found = path(options)
    sums = [
        tuple(sum(getattr(known[each], name) for each in choice.items()) for name in ("cost", "error"))
        for choice in found
    ]
    assert sums == sorted(sums)
    assert [error for _, error in sums] == sorted((error for _, error in sums), reverse=True)
    assert sums[0][0] == pytest.approx(sum(min(each.cost for each in several) for several in options.values()))
    assert sums[-1][1] == 0
    for price in np.geomspace(1e-3, 1e3, 50):
        best = sum(min(each.cost + price * each.error for each in several) for several in options.values())
        assert min(cost + price * error for cost, error in sums) == pytest.approx(best)


def test_parts_that_are_not_on_the_way_keep_their_dtype():
    options = {"a": [Option("int8", 1, 1), Option("fp32", 2, 0)]}
    assert path(options, {"b": "int4wo"}) == [{"a": "int8", "b": "int4wo"}, {"a": "fp32", "b": "int4wo"}]


def test_an_option_that_another_one_beats_is_never_chosen():
    options = {"a": [Option("int8", 2, 1), Option("int4wo", 1, 1), Option("int8wo", 1, 0.5), Option("fp32", 3, 0.5)]}
    assert path(options) == [{"a": "int8wo"}]


def test_what_becomes_of_an_error_follows_from_own_and_accumulated_drift():
    names = part_names(2, 2)
    gains = np.array([1, 0.5, 2, 0.25, 1, 3, 2, 0.5])
    own = {dtype: np.array([1, 2, 1, 3, 0, 1, 2, 1]) * scale for dtype, scale in (("int8", 0.1), ("int4wo", 0.3))}
    drifts = {}
    for dtype, errors in own.items():
        total = np.zeros(len(names))
        for depth in range(len(names)):
            total[depth] = (gains[depth] * total[depth - 1] if depth else 0) + errors[depth] ** 2
        drifts[dtype] = [Drift(np.sqrt(total).tolist(), errors.tolist())] * 3
    found = Sensitivity.of(names, [name for name in names if name != "decoder.embed"], drifts)
    assert found.own["vision.merger", "int8"] == pytest.approx(0.3)
    assert found.to_features["vision.blocks.0"] == pytest.approx(2 * 0.25)
    assert found.to_features["decoder.layers.0"] == 0
    assert found.to_logits["decoder.layers.0"] == pytest.approx(2 * 0.5)
    assert found.to_logits["decoder.head"] == 1
    everywhere = {name: "int8" for name in names if name != "decoder.embed"}
    assert found.logits(everywhere) == pytest.approx(drifts["int8"][0].total[-1] ** 2)
    assert found.features(everywhere) == pytest.approx(drifts["int8"][0].total[names.index("vision.merger")] ** 2)
    assert found.logits(dict.fromkeys(everywhere, "fp32")) == 0


def test_an_error_that_is_not_finite_is_the_largest_and_leaves_the_others_as_they_are():
    names = part_names(1, 1)
    fine, broken = [0.1] * len(names), [0.1, math.nan, *[math.inf] * (len(names) - 2)]
    parts = [name for name in names if name != "decoder.embed"]
    found = Sensitivity.of(names, parts, {"int8": [Drift(fine, fine)], "int4wo": [Drift(broken, broken)]})
    assert found.own["vision.blocks.0", "int8"] == pytest.approx(0.1)
    assert found.own["vision.blocks.0", "int4wo"] > 1e5
    everywhere = [dict.fromkeys(parts, dtype) for dtype in ("int8", "int4wo")]
    assert all(math.isfinite(each) for choice in everywhere for each in (found.features(choice), found.logits(choice)))


def _trial(name, cost, drift, equal=64):
    return Trial(name, {}, drift, 0, drift / 2, equal, 64, bytes=cost, seconds=1 / cost)


def test_of_those_that_keep_the_bounds_the_cheapest_is_chosen():
    trials = [_trial("a", 3, 0), _trial("b", 2, 0.04, 63), _trial("c", 1, 0.06), _trial("d", 1.5, math.nan)]
    assert cheapest(trials, Goal(0.05, 0.9, "size")).name == "b"
    assert cheapest(trials, Goal(0.05, 1.0, "size")).name == "a"
    assert cheapest(trials, Goal(0.1, 0.0, "size")).name == "c"
    assert cheapest(trials, Goal(0.05, 0.0, "speed")).name == "a"


def test_a_tower_has_the_precision_of_most_of_its_parts():
    choice = {"vision.blocks.0": "int8", "vision.merger": "int8", "decoder.layers.0": "int4wo", "decoder.head": "fp32"}
    precision = precision_of(choice)
    assert precision.vision == "int8"
    assert {part: precision.of(f"{part}.product") for part in choice} == choice
    assert len(precision.layers) == 1


def test_the_bundle_is_what_was_chosen(found, record):
    manifest = found.manifest
    trials = {trial["name"]: trial for trial in record["trials"]}
    chosen = trials[record["chosen"]]
    assert chosen["meets"]
    assert {part: each["dtype"] for part, each in record["parts"].items()} == chosen["choice"]
    assert (manifest.dtype, manifest.vision_dtype) == (record["dtype"], record["vision_dtype"])
    assert manifest.layers_dtype == record["layers_dtype"]
    assert manifest.calibration.rows == manifest.recipe.answers == chosen["rows"] == ROWS
    assert manifest.recipe.features == chosen["vision"] <= MAX_DRIFT
    assert manifest.recipe.logits <= MAX_DRIFT
    assert manifest.recipe.answers_equal == chosen["equal"]
    assert (manifest.recipe.prefer, manifest.recipe.max_drift) == ("size", MAX_DRIFT)
    # The sum of the parts is the size of the whole.
    assert sum(bytes_by_part(found, []).values()) == pytest.approx(chosen["bytes"], rel=0.01)
    assert not (found.path / "recipe").exists()


def test_it_costs_less_than_one_precision_everywhere(record):
    trials = {trial["name"]: trial for trial in record["trials"]}
    assert set(trials) >= set(CANDIDATES)
    uniform = [trials[name] for name in CANDIDATES if trials[name]["meets"]]
    assert trials[record["chosen"]]["bytes"] < min(trial["bytes"] for trial in uniform)
    assert all(trial["seconds"] > 0 for trial in trials.values())
    assert (trials["fp32"]["vision"], trials["fp32"]["decode"], trials["fp32"]["equal"]) == (0, 0, ROWS)
    assert trials["int4wo"]["bytes"] < trials["int8wo"]["bytes"] < trials["fp32"]["bytes"]


def test_every_part_says_why_it_has_its_dtype(record):
    assert list(record["parts"]) == [name for name in part_names(4, 4) if name != "decoder.embed"]
    for name, part in record["parts"].items():
        chosen, options = part["dtype"], part["options"]
        cheaper = [dtype for dtype in options if options[dtype]["bytes"] < options[chosen]["bytes"]]
        assert all(f"{dtype} would save " in part["why"] for dtype in cheaper)
        assert bool(cheaper) != (part["why"] == "nothing is smaller")
        assert options["fp32"]["own_error"] == 0
        assert options["fp32"]["takes"] == {"features": 0, "logits": 0}
        # What the decoder computes does not change the features.
        assert all((each["takes"]["features"] > 0) <= name.startswith("vision") for each in options.values())
        assert all(options[dtype]["own_error"] > 0 for dtype in INTEGERS)
    # A tied head in fp32 is the table of tokens, which is there in any case.
    assert record["parts"]["decoder.head"]["options"]["fp32"]["bytes"] == 0


def test_pytorch_agrees_on_what_was_measured(found, tmp_path):
    config = CompareConfig(
        bundle=found.path, checkpoint=TINY, input=(str(QUESTIONS),), output=tmp_path / "out", limit=ROWS,
        max_drift=MAX_DRIFT, min_agreement=0,
    )  # fmt: skip
    outcome = compare(config)
    drift, recipe = outcome.summary["drift"], found.manifest.recipe
    assert outcome.passed
    assert drift["vision"]["max"] == pytest.approx(recipe.features, rel=1e-2)
    assert max(drift["prefill"]["max"], drift["decode"]["max"]) == pytest.approx(recipe.logits, rel=1e-2)
    assert outcome.summary["agreement"]["count"] == recipe.answers_equal


def test_the_bundle_answers_and_has_the_checkpoint_in_fp32(found, demo):
    assert found.in_fp32().manifest.dtype == found.in_fp32().manifest.vision_dtype == "fp32"
    with Captioner(found.path) as captioner:
        (found,) = captioner.caption([demo[0]["image"]["bytes"]], demo[0]["prompt"])
    assert found.answer


def test_a_saved_recipe_makes_the_same_weights_again(found):
    _run(1, found.path.parent, f"--image-size 224 --sample-rows {ROWS}")
    again = Bundle.load(found.path.parent / "tuned")
    for name in (VISION, DECODER):
        assert again.manifest.files[f"{name}.data"] == found.manifest.files[f"{name}.data"]
    assert again.manifest.layers_dtype == found.manifest.layers_dtype
    assert again.manifest.recipe is None


def test_time_is_that_of_products_and_of_the_rest(tiny_bundle, record, tmp_path):
    parts = list(record["parts"])
    side = tiny_bundle.manifest.layout.resolution.image_size
    one, twice = (
        seconds_by_part(tiny_bundle, parts, parts, _workload(images, side), tmp_path) for images in (0.0, 2.0)
    )
    assert all(one[part] > 0 for part in [*parts, REST] if part.startswith("decoder"))
    assert all((one[part] > 0) == (not part.startswith("vision")) for part in parts)
    assert all(twice[part] > 0 for part in parts)
    assert list(tmp_path.iterdir()) == []


def _workload(images, side):
    from export.recipe.cost import Workload  # noqa: PLC0415

    return Workload((side, side), images, row_tokens=40, answer_tokens=4)


def test_a_row_that_fails_is_out_of_bounds(tiny_bundle, monkeypatch):
    side = side_of(tiny_bundle, layers=False)
    monkeypatch.setattr("export.recipe.trial.answered", lambda *_: iter([None]))
    reference = type("Reference", (), {"rows": [None], "traces": [None], "penalty": 1.0})
    trial = measure("broken", {}, side, reference, (0, 0))
    assert trial.drift == math.inf
    assert not trial.meets(Goal(1e9, 0, "size"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drift": 0.1}, "--max-drift is for --recipe auto"),
        ({"prefer": "size"}, "--prefer is for --recipe auto"),
        ({"min_agreement": 0.9, "recipe": "recipe.json"}, "--min-agreement is for --recipe auto"),
        ({"recipe": "auto"}, "--recipe auto needs --sample and --max-drift"),
        ({"recipe": "auto", "sample": QUESTIONS}, "--recipe auto needs --sample and --max-drift"),
        ({"recipe": "auto", "sample": QUESTIONS, "max_drift": 0.0}, "--max-drift must be more than 0"),
        ({"recipe": "auto", "sample": QUESTIONS, "max_drift": math.nan}, "--max-drift must be more than 0"),
        ({"recipe": "auto", "sample": QUESTIONS, "max_drift": 0.1, "min_agreement": 90}, "--min-agreement from 0 to 1"),
        ({"recipe": "auto", "dtype": "int8"}, "--dtype is not possible with --recipe"),
        ({"recipe": "x.json", "vision_dtype": "int8"}, "--vision-dtype is not possible with --recipe"),
        ({"recipe": "x.json", "fp32_layers": ("decoder.head",)}, "--fp32-layers is not possible with --recipe"),
        ({"recipe": "auto", "device": "cuda"}, "--device cuda is not possible with --recipe"),
        ({"recipe": "nowhere.json"}, "--recipe nowhere.json cannot be read: .*; give auto, or the recipe.json of"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, tmp_path):
    with pytest.raises(JobError, match=message):
        export_bundle(ExportConfig(checkpoint=TINY, output=tmp_path / "out", **options), traces=TRACES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read"),
        ("[]", "has no dtype"),
        ('{"dtype": "int8", "vision_dtype": "int8"}', "has no layers_dtype"),
        ('{"dtype": "int9", "vision_dtype": "int8", "layers_dtype": {}}', "dtype is 'int9', not one of fp32, int8"),
        ('{"dtype": ["int8"], "vision_dtype": "int8", "layers_dtype": {}}', "dtype is .'int8'., not one of"),
        ('{"dtype": "int8", "vision_dtype": "int8", "layers_dtype": []}', "layers_dtype is not an object"),
        (
            '{"dtype": "int8", "vision_dtype": "int8", "layers_dtype": {"decoder.layers.9": "fp32"}}',
            "decoder.layers.9=fp32: there is no such layer",
        ),
        ('{"dtype": "bf16", "vision_dtype": "fp32", "layers_dtype": {}}', "dtype is 'bf16', not one of fp32, int8"),
    ],
)
def test_a_file_that_is_no_recipe_for_this_checkpoint_is_refused(text, message, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(JobError, match=f"--recipe {file}:? {message}"):
        _export(tmp_path / "out", recipe=str(file))


def test_a_sample_without_images_is_refused(tiny_bundle, tmp_path):
    layout = tiny_bundle.manifest.layout
    row = SampleRow([*layout.head_ids, *layout.tail_ids], [], [])
    with pytest.raises(JobError, match="none of the rows of --sample has an image"):
        Reference.of(tiny_bundle, [row], Disk(tmp_path))


def test_the_page_shows_what_was_chosen_and_against_what(found, record, chromium):
    show(chromium, found.path / PAGE)
    text = chromium.find_element(By.TAG_NAME, "main").text
    assert f"{record['lost']['count']} of {ROWS}" in text
    dots = chromium.find_elements(By.CLASS_NAME, "dot")
    keys = 3
    assert len(dots) == 2 * len(record["trials"]) + keys
    assert len([dot for dot in dots if "chosen" in dot.get_attribute("class")]) == 2 + 1
    parts = chromium.find_elements(By.CSS_SELECTOR, "#parts tr")[1:]
    assert len(parts) == len(record["parts"])
    for row, (name, part) in zip(parts, record["parts"].items(), strict=True):
        assert row.text.startswith(f"{name} {part['dtype']} ")
        assert row.text.endswith(part["why"])
    assert len(chromium.find_elements(By.CSS_SELECTOR, "#trials tr")) == len(record["trials"]) + 1
    set_screen(chromium, 390, 800)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= 390
    assert complaints(chromium) == []


def test_the_page_of_a_recipe_that_found_nothing_better_and_of_trials_that_failed(record):
    trials = [trial | {"vision": "inf", "meets": False} for trial in record["trials"]]
    trials[0] = record["trials"][0]
    page = render(record | {"trials": trials, "chosen": "fp32"}, "<script>")
    assert "only fp32 meets this" in page
    assert "<script>" not in page
    assert "out of bounds" in page


@pytest.mark.long
def test_it_beats_every_precision_that_keeps_the_bound_on_the_demo_questions(tmp_path):
    mixed = _export(
        tmp_path / "mixed", image_size=672, sample_rows=24, recipe="auto", max_drift=MAX_DRIFT, prefer="size"
    )
    chosen = sum(bytes_by_part(mixed, []).values())
    record = json.loads((mixed.path / RECIPE).read_text())
    sizes = [trial["bytes"] for trial in record["trials"] if trial["name"] in CANDIDATES and trial["meets"]]
    for dtype in INTEGERS:  # rounded to nearest, too
        bundle = _export(tmp_path / dtype, image_size=672, sample=None, dtype=dtype)
        config = CompareConfig(
            bundle=bundle.path, checkpoint=TINY, input=(str(QUESTIONS),), output=tmp_path / f"c-{dtype}",
            max_drift=MAX_DRIFT, min_agreement=0,
        )  # fmt: skip
        if compare(config).passed:
            sizes.append(sum(bytes_by_part(bundle, []).values()))
    assert chosen < 0.9 * min(sizes)


@pytest.mark.long
def test_a_bundle_of_images_at_their_own_size_has_a_recipe_for_speed(tmp_path):
    bundle = _export(
        tmp_path / "native", image_size="native", max_seq_len=512, sample_rows=4, recipe="auto", max_drift=0.3,
        min_agreement=0.5,
    )  # fmt: skip
    record = json.loads((bundle.path / RECIPE).read_text())
    trials = {trial["name"]: trial for trial in record["trials"]}
    meeting = [trial["seconds"] for trial in trials.values() if trial["meets"]]
    assert trials[record["chosen"]]["seconds"] == min(meeting)
    assert bundle.manifest.recipe.prefer == "speed"
    assert bundle.manifest.recipe.answers_equal >= 2
