"""A job over tables as people have them: columns that differ between files, and images in cells of all kinds."""

import base64
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from output_folders import read_answers, rows_by_id

from qvl_batch import Captioner
from qvl_batch.images.pixels import decode_image

PER_FILE = 2
#: Names of files, and their folders; those of the second half are added later.
FILES = (
    "split=train/text", "split=train/pixels", "split=dev/lists", "split=dev/tensors", "split=a%20b/data",
    "split=__HIVE_DEFAULT_PARTITION__/dictionary", "split=late/spark", "split=late/ray",
)  # fmt: skip


@pytest.fixture(scope="module")
def images(demo):
    """Image files and prompts, two for each file; those of tensors have the same size."""
    rows = [(row["image"]["bytes"], row["prompt"]) for row in demo[: PER_FILE * len(FILES)]]
    at = PER_FILE * FILES.index("split=dev/tensors")
    rows[at + 1] = (rows[at][0], rows[at + 1][1])
    return rows


def _pixels(data):
    return np.asarray(decode_image(data))


def _spark(data):
    pixels = _pixels(data)
    sizes = dict(zip(("height", "width", "nChannels"), pixels.shape, strict=True))
    return {"origin": "file:/x", **sizes, "mode": 16, "data": pixels[..., ::-1].tobytes()}


def _cells(name, data):
    """A column of images of the kind that a file has."""
    from ray.data.extensions import ArrowTensorArray  # noqa: PLC0415  (it takes a second)

    nested = pa.list_(pa.list_(pa.list_(pa.uint8())))
    text = [base64.b64encode(each).decode() for each in data]
    ragged = np.empty(len(data), object)
    ragged[:] = [_pixels(each).transpose(2, 0, 1) / 255 for each in data]
    kinds = {
        "text": lambda: pa.array([text[0], f"data:image/png;base64,{text[1]}"]),
        "pixels": lambda: pa.array([_pixels(each).tolist() for each in data], nested),
        "lists": lambda: pa.array([[{"bytes": each}] for each in text]),
        "tensors": lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([_pixels(each) for each in data])),
        "data": lambda: pa.array([[f"data:;base64,{each}"] for each in text]),
        "dictionary": lambda: pa.array(data).dictionary_encode(),
        "spark": lambda: pa.array([_spark(each) for each in data]),
        "ray": lambda: ArrowTensorArray.from_numpy(ragged),
    }
    return kinds[name]()


def _write(folder, number, images):
    name = FILES[number]
    rows = images[PER_FILE * number : PER_FILE * (number + 1)]
    keys = [PER_FILE * number + at for at in range(PER_FILE)]
    asked = [{"key": f"k{key:02}", "ask": prompt} for key, (_, prompt) in zip(keys, rows, strict=True)]
    columns = {"img": _cells(name.split("/")[1], [data for data, _ in rows]), "meta": pa.array(asked)}
    columns["answer"] = pa.array([f"true {key}" for key in keys])
    if number == 0:
        columns["note"] = pa.array([1, 2**53 + 1])
    elif number == 1:
        columns["note"] = pa.array([0.5, None])
    if number > 1:
        columns["answer"] = columns["answer"].dictionary_encode()
        columns["tags"] = pa.array([[{"t": key}] for key in keys])
    path = folder / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.mark.long
def test_tables_as_people_have_them_are_answered_and_a_resume_adds_to_them(tiny_bundle, images, job, tmp_path):
    folder, output = tmp_path / "input", tmp_path / "out"
    half = len(FILES) - 2
    for number in range(half):
        _write(folder, number, images)
    options = ["--bundle", tiny_bundle.path, "--input", folder, "--output", output]
    options += ["--id-column", "meta.key", "--prompt-column", "meta.ask", "--image-column", "img"]
    kept = ["answer=truth", "split", "note", "tags", "meta.ask=asked"]
    result = job(*options, "--keep-columns", *kept)
    assert "note      column 'note' (--keep-columns) is missing in 4 of 6 files: it is null there" in result.stderr
    assert "note      column 'tags' (--keep-columns) is missing in 2 of 6 files: it is null there" in result.stderr
    first = rows_by_id(output)
    assert len(first) == PER_FILE * half

    for number in range(half, len(FILES)):
        _write(folder, number, images)
    result = job(*options, "--keep-columns", *kept)
    assert f"resuming  {PER_FILE * half} rows are answered already, 4 are left" in result.stderr
    rows = rows_by_id(output)
    assert rows[: len(first)] == first
    assert [row["id"] for row in rows] == [f"k{at:02}" for at in range(len(images))]
    assert [row["truth"] for row in rows] == [f"true {at}" for at in range(len(images))]
    assert [row["asked"] for row in rows] == [prompt for _, prompt in images]
    splits = ["train", "train", "dev", "dev", "a b", None, "late", "late"]
    assert [row["split"] for row in rows] == [each for each in splits for _ in range(PER_FILE)]
    assert [row["note"] for row in rows] == [1.0, None, 0.5] + [None] * 13
    assert [row["tags"] for row in rows] == [None] * 4 + [[{"t": at}] for at in range(4, len(images))]
    schema = read_answers(output).schema
    assert (schema.field("note").type, schema.field("truth").type) == (pa.float64(), pa.string())

    with Captioner(tiny_bundle.path) as captioner:
        expected = captioner.caption([data for data, _ in images], [prompt for _, prompt in images])
    for at, (row, answer) in enumerate(zip(rows, expected, strict=True)):
        if at == 1:
            assert row["error_message"].startswith("column 'note' (--keep-columns) has 9007199254740993, int64, which")
        else:
            assert (row["answer"], row["error_message"]) == (answer.answer, None)
    assert json.loads((output / "_run.json").read_text())["errors"] == {"read: RecordError": 1}

    result = job(*options, "--keep-columns", "answer", status=1)
    assert "such as --keep-columns answer=my_answer" in result.stderr
    result = job(*options, "--keep-columns", "answer=real", status=1)
    assert "another --keep-columns" in result.stderr


def test_a_column_of_paths_is_refused_before_a_worker_starts(tiny_bundle, call, tmp_path):
    pq.write_table(pa.table({"image": ["a.jpg", "b.jpg"]}), tmp_path / "a.parquet")
    options = ["--bundle", tiny_bundle.path, "--input", tmp_path / "a.parquet", "--output", tmp_path / "out"]
    result = call(*options, "--prompt", "What?", status=1)
    assert "column 'image' has paths or addresses of images; allow folders or addresses for them with" in result.stderr
    assert not (tmp_path / "out").exists()
