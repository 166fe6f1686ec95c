"""Images at their own size, several of them, conversations: answered as transformers answers them, from end to end."""

import base64
import dataclasses
import io
import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import make_checkpoint
from conftest import QUESTIONS, ROOT, TINY, exported, nodes_of
from image_files import image_file
from mixed_rows import MIXED, mixed_rows, picture
from output_folders import read_answers
from PIL import Image
from test_export import SHAPES

from export.comparison.config import CompareConfig
from export.comparison.run import compare
from qvl_batch import Captioner
from qvl_batch.bundle.layout import PlacedImage
from qvl_batch.config import CaptionConfig
from qvl_batch.decoder import decoder
from qvl_batch.decoder.decoder import Decoder, PrefillRow
from qvl_batch.decoder.engine import Engine
from qvl_batch.decoder.requests import Request
from qvl_batch.errors import ConfigError
from qvl_batch.images.view import View
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.source import open_source
from qvl_batch.pipeline.plan import make_plan


def _compared(bundle, folder, rows, checkpoint=TINY, **options):
    """A comparison of rows with the checkpoint in PyTorch."""
    pq.write_table(pa.Table.from_pylist(rows, MIXED), folder / "rows.parquet", row_group_size=7)
    settings = {"messages_column": "messages", "image_column": "images", "max_new_tokens": 12}
    return compare(
        CompareConfig(
            bundle=bundle.path, checkpoint=checkpoint, input=(str(folder / "rows.parquet"),),
            output=str(folder / "out"), **settings | options,
        )
    )  # fmt: skip


def test_every_answer_and_every_layer_is_that_of_transformers(native_bundle, tmp_path):
    outcome = _compared(native_bundle, tmp_path, mixed_rows(10, seed=3), layers=True)
    summary = outcome.summary
    assert outcome.passed, summary["verdict"]
    assert summary["agreement"]["count"] == summary["compared"] == summary["rows"] == 10
    assert summary["inputs_differ"] == 0
    assert summary["layers"]["begins_at"] is None
    rows = pq.read_table(tmp_path / "out" / "comparison.parquet").to_pylist()
    assert {len(row["image_width"]) for row in rows} >= {0, 1, 2}


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_hundreds_of_conversations_are_answered_as_transformers_does(seed, native_bundle, tmp_path):
    outcome = _compared(native_bundle, tmp_path, mixed_rows(75, seed=10 + seed))
    assert outcome.passed, outcome.summary["verdict"]
    assert outcome.summary["agreement"]["count"] == 75


@pytest.mark.long
@pytest.mark.parametrize("name", SHAPES)
def test_any_shape_is_right_where_windows_are_cut(name, tmp_path):
    text, vision, _ = SHAPES[name]
    checkpoint = make_checkpoint(tmp_path / "checkpoint", text=text, vision=vision)
    bundle = exported(tmp_path / "bundle", checkpoint=checkpoint, image_size="native", max_seq_len=2048, traces=None)
    assert bundle.manifest.parity.agreement == 1
    # A decoder of one layer has no states between layers.
    layers = bundle.manifest.decoder.layers > 1
    outcome = _compared(bundle, tmp_path, mixed_rows(12, seed=5, most_images=2), checkpoint, layers=layers)
    assert outcome.summary["agreement"]["count"] == 12
    assert outcome.passed, outcome.summary["verdict"]


def test_answers_do_not_depend_on_batch_order_and_parts(native_bundle, monkeypatch):
    rows = mixed_rows(14, seed=8)
    asked = [json.loads(row["messages"]) for row in rows]
    images = [[image["bytes"] for image in row["images"]] for row in rows]
    order = np.random.default_rng(0).permutation(len(rows))
    found = []
    for slots, tokens, places in ((1, 4096, range(14)), (8, 1024, order), (4, 100, order)):
        monkeypatch.setitem(decoder.PREFILL_TOKENS, "cpu", tokens)
        with Captioner(native_bundle.path, slots=slots) as captioner:
            answers = captioner.caption(
                [images[at] for at in places], messages=[asked[at] for at in places], max_new_tokens=12
            )
        found.append(
            [answer.answer for _, answer in sorted(zip(places, answers, strict=True), key=lambda pair: pair[0])]
        )
    assert found[0] == found[1] == found[2]
    assert None not in found[0]


@pytest.mark.usefixtures("cluster")
def test_a_job_of_lists_and_conversations(native_bundle, tmp_path, monkeypatch):
    from qvl_batch.pipeline.run import run  # noqa: PLC0415  (Ray is imported where it is needed)

    del monkeypatch
    rows = mixed_rows(9, seed=4)
    rows[2]["images"] = [*rows[2]["images"], {"bytes": b"none", "path": None}]
    rows[2]["messages"] = json.dumps(
        [
            {
                "role": "user",
                "content": [*[{"type": "image"}] * len(rows[2]["images"]), {"type": "text", "text": "What?"}],
            }
        ]
    )
    rows[5]["messages"] = json.dumps([*json.loads(rows[5]["messages"]), {"role": "assistant", "content": "no"}])
    pq.write_table(pa.Table.from_pylist(rows, MIXED), tmp_path / "rows.parquet", row_group_size=4)
    settings = {
        "bundle": native_bundle.path, "input": (str(tmp_path / "rows.parquet"),), "output": str(tmp_path / "out"),
        "messages_column": "messages", "image_column": "images", "answer_last_turn_again": True, "boxes": True,
        "max_new_tokens": 8, "vision_cache": tmp_path / "cache", "max_pixels": 300_000,
    }  # fmt: skip
    report = run(CaptionConfig(**settings, limit=4))
    assert report.total.rows == 4
    report = run(CaptionConfig(**settings))
    assert "boxes     5 of 5 answers of this run are not readable as boxes" in str(report)
    assert report.record()["unreadable_boxes"] == 5
    table = read_answers(tmp_path / "out")
    answers = {row["id"]: row for row in table.to_pylist()}
    assert set(answers) == {row["id"] for row in rows}
    assert table.schema.field("seen_width").type == pa.list_(pa.int32())
    wrong = answers["row-2"]
    count = len(rows[2]["images"])
    assert wrong["error_stage"] == "image"
    assert wrong["error_message"].startswith(f"image {count} of {count}: " if count > 1 else "")
    assert answers["row-5"]["expected"] == "no"
    for row in rows:
        answer = answers[row["id"]]
        if row["id"] == "row-2":
            continue
        assert answer["finish_reason"] in ("stop", "length"), answer
        assert len(answer["image_width"]) == len(row["images"]) == len(answer["seen_height"])
        seen = [w * h for w, h in zip(answer["seen_width"], answer["seen_height"], strict=True)]
        assert all(pixels <= 300_000 for pixels in seen)
        assert answer["prompt_tokens"] > sum(seen) // 784
    with Captioner(native_bundle.path, max_pixels=300_000) as captioner:
        (alone,) = captioner.caption(
            [[image["bytes"] for image in rows[0]["images"]]],
            messages=[json.loads(rows[0]["messages"])],
            max_new_tokens=8,
        )
    assert alone.answer == answers["row-0"]["answer"]
    assert [size[2] for size in alone.image_sizes] == answers["row-0"]["seen_width"]


def _by_hand(script, bundle, image, prompt, folder):
    (folder / "by_hand.py").write_text(script)
    command = [sys.executable, "by_hand.py", str(bundle.path), str(image), prompt]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("kind", ["square", "native"])
def test_the_plain_graphs_run_by_hand_as_the_page_says(kind, tiny_bundle, native_bundle, tmp_path):
    page = (ROOT / "export" / "README.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page.partition("### By hand")[2].partition("\n## ")[0], re.DOTALL)
    assert len([line for line in script.splitlines() if line.strip()]) <= 40
    bundle = {"square": tiny_bundle, "native": native_bundle}[kind]
    row = pq.read_table(QUESTIONS).slice(3, 1).to_pylist()[0]
    with Image.open(pa.BufferReader(row["image"]["bytes"])) as image:
        image.convert("RGB").resize((280, 196)).save(tmp_path / "image.png")
    said = _by_hand(script, bundle, tmp_path / "image.png", row["prompt"], tmp_path)
    options = {"fit": "stretch"} if kind == "square" else {}
    with Captioner(bundle.path, **options) as captioner:
        (answer,) = captioner.caption([tmp_path / "image.png"], [row["prompt"]], max_new_tokens=64)
    assert said == answer.answer
    assert said


class _Counting(Decoder):
    """Notes its prefills: rows and tokens, padding included; and steps."""

    def __init__(self, bundle, slots):
        super().__init__(bundle, slots, threads=1)
        self.calls = []

    def prefill(self, first, rows):
        self.calls.append(("prefill", [len(row.input_ids) for row in rows]))
        return super().prefill(first, rows)

    def prefill_part(self, slot, row, start, stop, entry=None):
        self.calls.append(("part", [stop - start]))
        return super().prefill_part(slot, row, start, stop, entry)

    def step(self, tokens):
        self.calls.append(("step", [len(tokens)]))
        return super().step(tokens)


def _row(bundle, grid, chance):
    layout = bundle.manifest.layout
    image = PlacedImage(layout.image_start, *grid)
    features = chance.standard_normal((image.tokens, bundle.manifest.decoder.hidden_size)).astype(np.float32)
    return PrefillRow(layout.row_ids([5] * 9, image.tokens), [image], [features])


def _answered(counting, requests):
    with Engine(counting, ()) as engine:
        futures = [engine.submit(request) for request in requests]
        return [future.result(timeout=60).token_ids for future in futures]


def test_rows_of_like_lengths_are_prefilled_together(native_bundle):
    chance = np.random.default_rng(1)
    grids = [(int(a), int(b)) for a, b in chance.integers(2, 14, (120, 2))]
    counting = _Counting(native_bundle, 16)
    _answered(counting, [Request(_row(native_bundle, grid, chance), 3) for grid in grids])
    lengths = [found for kind, found in counting.calls if kind == "prefill"]
    assert sum(map(len, lengths)) == 120
    padded = sum(len(found) * max(found) for found in lengths)
    assert padded <= 1.1 * sum(map(sum, lengths))
    assert all(len(found) * max(found) <= counting.prefill_tokens for found in lengths)
    assert max(map(len, lengths)) > 2


def test_a_long_row_does_not_hold_up_others(native_bundle, monkeypatch):
    monkeypatch.setitem(decoder.PREFILL_TOKENS, "cpu", 256)
    chance = np.random.default_rng(1)
    long, *short = (_row(native_bundle, grid, chance) for grid in ((40, 50), (3, 3), (3, 4), (4, 4)))
    counting = _Counting(native_bundle, 8)
    _answered(counting, [*[Request(row, 40) for row in short], Request(long, 3)])
    kinds = [kind for kind, _ in counting.calls]
    first, last = kinds.index("part"), len(kinds) - 1 - kinds[::-1].index("part")
    assert kinds.count("part") == -(-len(long.input_ids) // 256)
    assert "step" in kinds[first:last]
    assert all(not (a == b == "part") for a, b in zip(kinds[first:last], kinds[first + 1 :], strict=False))


def test_whatever_rows_begin_with_is_prefilled_once(native_bundle):
    chance = np.random.default_rng(1)
    layout = native_bundle.manifest.layout
    examples = [PlacedImage(20, 6, 7), PlacedImage(80, 5, 9)]
    features = [chance.standard_normal((image.tokens, 128)).astype(np.float32) for image in examples]
    ids = [7] * 20 + [layout.image_token_id] * 42 + [8] * 18 + [layout.image_token_id] * 45 + [9] * 60
    rows = []
    for number in range(6):
        own = PlacedImage(len(ids), 3, 3)
        rows.append(
            PrefillRow(
                [*ids, *[layout.image_token_id] * 9, *[10] * (3 + number)],
                [*examples, own],
                [*features, chance.standard_normal((9, 128)).astype(np.float32)],
            )
        )
    keys = [[b"a", b"b", b"own%d" % number] for number in range(6)]
    counting = _Counting(native_bundle, 8)
    shared = _answered(counting, [Request(row, 6, key) for row, key in zip(rows, keys, strict=True)])
    parts = [found for kind, found in counting.calls if kind == "part"]
    assert len(parts) >= 4  # what was submitted after the first was prefilled may miss
    assert all(length <= 9 + 8 for (length,) in parts)
    assert shared == _answered(_Counting(native_bundle, 8), [Request(row, 6) for row in rows])
    others = [[b"a", b"c%d" % number, b"own%d" % number] for number in range(6)]
    counting = _Counting(native_bundle, 8)
    assert _answered(counting, [Request(row, 6, key) for row, key in zip(rows, others, strict=True)]) == shared


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_blocks_of_large_images_have_fewer_rows(native_bundle, tmp_path):
    from ray.data import DataContext  # noqa: PLC0415

    from qvl_batch.pipeline.dataset import Pipeline  # noqa: PLC0415
    from qvl_batch.pipeline.pool import WorkerPool  # noqa: PLC0415

    sizes = [*[(1500, 1000)] * 12, *[(100, 100)] * 12]
    images = [image_file(Image.new("RGB", size, (at, 0, 0)), "PNG") for at, size in enumerate(sizes)]
    pq.write_table(pa.table({"id": range(24), "image": images, "prompt": ["x"] * 24}), tmp_path / "rows.parquet")
    config = CaptionConfig(
        bundle=native_bundle.path, input=(str(tmp_path / "rows.parquet"),), output=str(tmp_path / "out")
    )
    plan, source = make_plan(config, native_bundle.manifest, nodes_of(2)), open_source(config)
    view = View.of(native_bundle.manifest.layout.resolution)
    pipeline = Pipeline(
        config, native_bundle, plan, source.columns, view, Fetcher(()), frozenset(), WorkerPool(plan, print)
    )
    context = DataContext.get_current()
    before, context.target_max_block_size = context.target_max_block_size, plan.block_bytes
    prepared = pipeline._prepare(pipeline._read(list(source.units())))  # noqa: SLF001  (what comes after has no blocks)
    blocks = [len(table) for table in prepared.iter_batches(batch_size=None, batch_format="pyarrow")]
    context.target_max_block_size = before
    assert sum(blocks) == 24
    assert max(blocks) == 8
    assert sorted(blocks)[:2] == [4, 4]


def test_blocks_are_bounded_by_bytes(native_bundle, tiny_bundle, tmp_path):
    def plan(bundle):
        config = CaptionConfig(bundle=bundle.path, input=("x",), output=str(tmp_path))
        return make_plan(config, bundle.manifest, nodes_of(4))

    native, square = plan(native_bundle), plan(tiny_bundle)
    assert native.block_bytes == square.block_bytes
    row = 4 * native_bundle.manifest.layout.resolution.max_tokens * 128
    assert native.bytes_in_flight() < 3 * native.calls_per_decoder * max(native.block_bytes, row)
    assert native.calls_per_decoder > square.calls_per_decoder == 7


def test_boxes_come_back_in_pixels_of_the_file(native_bundle, monkeypatch):
    said = json.dumps([{"bbox_2d": [28, 0, 56, 56], "label": "star"}])
    monkeypatch.setattr("qvl_batch.decoder.prompts.RowLayout.text", lambda *_: said)
    with Captioner(native_bundle.path) as captioner:
        (found,) = captioner.caption([picture(0, (1000, 500))], ["Where?"], max_new_tokens=2)
        cut, answer = (dataclasses.replace(found, finish_reason=reason) for reason in ("length", "stop"))
        assert captioner.boxes(cut) is None
        (box,) = captioner.boxes(answer)
    ((width, height, seen_width, seen_height, _),) = answer.image_sizes
    assert (width, height) == (1000, 500)
    assert (box.label, box.x0, box.x1) == ("star", 28 * 1000 / seen_width, 56 * 1000 / seen_width)
    assert box.y1 == 56 * 500 / seen_height


@pytest.fixture(scope="module")
def captioner(native_bundle):
    with Captioner(native_bundle.path) as captioner:
        yield captioner


def test_a_captioner_takes_lists_and_conversations_of_any_kind_of_image(captioner, tmp_path):
    one, other = picture(1, (90, 60)), picture(2, (60, 90))
    (tmp_path / "one.png").write_bytes(one)
    text = {"type": "text", "text": "Which?"}

    def asked(*images):
        return [{"role": "user", "content": [*({"type": "image", "image": image} for image in images), text]}]

    address = f"data:image/png;base64,{base64.b64encode(one).decode()}"
    (expected,) = captioner.caption([[one, other]], ["Which?"], max_new_tokens=6)
    assert expected.failure is None
    assert [size[:2] for size in expected.image_sizes] == [(90, 60), (60, 90)]
    same = captioner.caption(
        messages=[
            asked(one, other),
            asked(str(tmp_path / "one.png"), Image.open(io.BytesIO(other))),
            asked({"bytes": one, "path": None}, np.asarray(Image.open(io.BytesIO(other)))),
            asked(address, {"bytes": other, "path": None}),
            [{"from": "human", "value": "<image><image>Which?"}],
        ],
        images=[[], [], [], [], (one, other)],
        max_new_tokens=6,
    )
    assert [answer.answer for answer in same] == [expected.answer] * 5
    assert {answer.image_sizes for answer in same} == {expected.image_sizes}


def test_a_captioner_says_which_image_or_message_is_wrong(captioner):
    image = picture(1, (90, 60))
    found = captioner.caption([[image, b"none"], [], [image, image]], ["a", "b", "c"], max_new_tokens=2)
    assert [answer.failure and answer.failure.message[:12] for answer in found] == [
        "image 2 of 2",
        "the list of ",
        None,
    ]
    (wrong,) = captioner.caption(messages=[[{"role": "tool", "content": "x"}]])
    assert "message 1: its role is 'tool'" in wrong.failure.message
    (long,) = captioner.caption([[picture(3, (1200, 1200))] * 3], ["x"])
    assert re.search(r"\d+ of 3 images; the bundle takes 4095 .*--max-pixels", long.failure.message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give prompts or messages, and not both"),
        ({"images": [b""], "prompts": "x", "messages": [[]]}, "give prompts or messages, and not both"),
        ({"prompts": ["x"]}, "prompts need images"),
        ({"images": [b""], "messages": [[], []]}, "1 images and 2 conversations"),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(arguments, message, captioner):
    with pytest.raises(ConfigError, match=message):
        captioner.caption(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "crop"}, "--fit crop: this bundle shows images at their own size"),
        ({"max_pixels": 100}, "--max-pixels 100: this bundle takes 3136 to"),
    ],
)
def test_a_captioner_refuses_options_of_other_bundles(options, message, native_bundle):
    with pytest.raises(ConfigError, match=message):
        Captioner(native_bundle.path, **options)


def test_a_system_prompt_is_put_in_front_where_there_is_none(native_bundle, tiny_checkpoint):
    with Captioner(native_bundle.path, system_prompt="Be brief.") as captioner:
        answers = captioner.caption(
            messages=[
                [{"role": "user", "content": "How many?"}],
                [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}],
            ],
            max_new_tokens=3,
        )
    assert answers[0] == answers[1]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    text = tiny_checkpoint.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert answers[0].prompt_tokens == len(tiny_checkpoint.tokenizer(text).input_ids)
