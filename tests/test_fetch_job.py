"""A job over images of several hosts, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from output_folders import read_answers, rows_by_id, shown_page
from web import Answer, serving

VALUE = "value-that-only-one-host-gets"


def _texts(folder):
    """Everything that files of a folder say: of parquet files, values and metadata."""
    for path in folder.rglob("*"):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield path, f"{table.to_pylist()} {table.schema.metadata} {pq.read_metadata(path).metadata}"
        elif path.is_file():
            yield path, path.read_bytes().decode(errors="replace")


@pytest.mark.long
def test_images_of_several_hosts_are_answered_and_secrets_stay_where_they_belong(tiny_bundle, demo, ray_env, tmp_path):
    images = [row["image"]["bytes"] for row in demo[:24]]
    with serving() as web, serving("127.0.0.2") as other:
        for at, image in enumerate(images):
            (web if at % 2 else other).answers[f"/{at}"] = Answer(body=image)
        web.moved("/1", f"{other.url}/1")
        other.answers["/1"] = Answer(body=images[1])
        web.answers["/3"] = Answer(404)
        web.answers["/5"] = Answer(body=b"<html>gone</html>")
        web.answers["/7"] = [Answer(429, {"Retry-After": "1"}), Answer(body=images[7])]
        web.moved("/9", "http://127.0.0.3/9")
        headers = tmp_path / "headers"
        headers.write_text(f"[{web.url}]\nAuthorization: Bearer {VALUE}\nX-Key: {VALUE}\n")
        locations = [f"{(web if at % 2 else other).url}/{at}" for at in range(24)]
        ids, prompts = [f"{at:02}" for at in range(24)], [row["prompt"] for row in demo[:24]]
        rows = pa.table({"id": ids, "image": locations, "prompt": prompts})
        pq.write_table(rows, tmp_path / "rows.parquet")
        output = tmp_path / "answers"
        command = [
            sys.executable,
            "jobs/caption.py",
            "--bundle",
            tiny_bundle.path,
            "--input",
            tmp_path / "rows.parquet",
        ]
        command += ["--output", output, "--allow-images-from", web.url, other.url, "--user-agent", "me/1"]
        command += ["--image-headers", headers, "--max-new-tokens", 4, "--connections-per-host", 2]
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=ray_env, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stderr

        failed = {row["id"]: row["error_message"] for row in rows_by_id(output) if row["finish_reason"] == "error"}
        assert sorted(failed) == ["03", "05", "09"]
        assert failed["03"] == f"{web.url}/3 cannot be read: 404 Not Found"
        assert failed["09"] == (
            f"{web.url}/9 is redirected to http://127.0.0.3/9, which is not inside any address of --allow-images-from"
        )
        run, page, _ = shown_page(output)
        host = f"127.0.0.1:{web.port}"
        hosts = run["hosts"]
        assert (hosts["hosts"], hosts["failing"], hosts["are_all"]) == (2, 1, True)
        (most,) = hosts["most_failures"]
        assert (most["host"], most["failures"], most["rows"]) == (host, 3, 12)
        assert "Failures by host" in page
        assert f"hosts     1 of 2 with failed images, most of {host}, 3 of its 12 rows" in done.stdout

        # Every request to the one host had the headers, none to the other, also not after a redirect.
        assert len(web.asked) == 13
        assert all(headers["Authorization"] == f"Bearer {VALUE}" for _, headers in web.asked)
        assert len(other.asked) == 13
        assert all(VALUE not in str(headers) for _, headers in other.asked)
        assert {headers["User-Agent"] for _, headers in [*web.asked, *other.asked]} == {"me/1"}
        assert web.most_at_once <= 2

        # No file of answers, no report and no log of Ray's has a value.
        texts = [*_texts(output), *_texts(Path(ray_env["RAY_TMPDIR"]))]
        assert {path.name for path, _ in texts} > {"_run.json", "_report.html", "raylet.out"}
        assert not [path for path, text in texts if VALUE in text]
        assert VALUE not in done.stdout + done.stderr

        # Headers are no part of what a job is: with others, it goes on.
        headers.write_text(f"[{other.url}]\nX-Other: {VALUE}\n")
        web.answers["/3"] = Answer(body=images[3])
        again = subprocess.run(
            [*map(str, command), "--retry-errors"],
            cwd=ROOT, env=ray_env, capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip
        assert again.returncode == 0, again.stderr
        assert read_answers(output)["id"].to_pylist().count("03") == 1
        assert sorted(row["id"] for row in rows_by_id(output) if row["finish_reason"] == "error") == ["05", "09"]
        assert json.loads((output / "_run.json").read_text())["rows"] == 24
