"""A bundle proves itself where it runs: what a machine computes wrongly, it does not answer."""

import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import QUESTIONS, ROOT, TINY, TRACES
from faults import add_fp32, forget_known_answers, seal, spoil
from PIL import Image
from saturating.sitecustomize import plant

import check
from export.config import ExportConfig
from export.package import export_bundle
from qvl_batch import Captioner
from qvl_batch.bundle.known_answers import SPACING, STEPS, Figure, KnownAnswers, digits, repeated
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, DECODER_DRAWN, DECODER_GUIDED, KNOWN_ANSWERS, VISION
from qvl_batch.config import CaptionConfig
from qvl_batch.decoder.decoder import Decoder, PrefillRow
from qvl_batch.errors import BundleError, DeviceError
from qvl_batch.pipeline.run import run
from qvl_batch.runtime import devices, session
from qvl_batch.vision.cache import open_vision_cache
from qvl_batch.vision.encoder import VisionEncoder

WRONG = "this machine computes the {} graph wrongly: error of {} "


@pytest.fixture
def saturating(monkeypatch):
    """Plants a kernel that saturates, in the sessions of one graph or of all."""
    monkeypatch.setattr("onnxruntime.InferenceSession", session.ort.InferenceSession)
    return lambda name=None: plant(session, name)


def test_a_bundle_carries_what_pytorch_makes_of_an_image_and_a_prompt(tiny_bundle):
    known, layout = KnownAnswers.of(tiny_bundle), tiny_bundle.manifest.layout
    tokens = layout.resolution.max_tokens
    assert known.pixels.shape == (672, 672, 3)
    assert known.features.shape == known.embeds.shape == (math.ceil(tokens / SPACING), 128)
    assert len(known.answer) == len(known.following) == STEPS
    assert (known.answer == known.following).all()  # in fp32, the graph says what PyTorch does
    assert known.is_decided.all()
    assert known.input_ids.tolist().count(layout.image_token_id) == tokens
    assert tiny_bundle.file(KNOWN_ANSWERS).stat().st_size < 2e6


def test_pytorch_says_them_again(tiny_bundle, tiny_checkpoint):
    import torch  # noqa: PLC0415  (this test alone asks it)

    known, layout = KnownAnswers.of(tiny_bundle), tiny_bundle.manifest.layout
    model = tiny_checkpoint.weights.streamed()
    image = tiny_checkpoint.image_processor([Image.fromarray(known.pixels)], return_tensors="pt")
    ids = torch.from_numpy(known.input_ids[None])
    embeds = torch.from_numpy(repeated(known.embeds, layout.resolution.max_tokens))
    with torch.inference_mode():
        features = model.model.visual(image["pixel_values"], grid_thw=image["image_grid_thw"]).pooler_output
        inputs = model.get_input_embeddings()(ids)
        inputs[0, known.input_ids == layout.image_token_id] = embeds
        kinds = (ids == layout.image_token_id).int()
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=image["image_grid_thw"])
        logits = model(inputs_embeds=inputs, position_ids=positions).logits[0, -1]
    assert np.abs(features.numpy()[::SPACING] - known.features).max() < 1e-5
    assert np.abs(logits.numpy() - known.logits).max() < 1e-4
    assert logits.argmax() == known.following[0]


def test_this_machine_computes_the_tiny_bundle_right_and_check_says_so(tiny_bundle, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check.py", str(tiny_bundle.path)])
    assert check.main() == 0
    said = capsys.readouterr().out
    assert said.count("✓") == 8
    assert "✗" not in said
    assert f"machine   {devices.processor()}, onnxruntime {session.ORT_VERSION}" in said
    assert "right     this machine computes the bundle as PyTorch does" in said


def test_check_is_a_command(tiny_bundle):
    command = [sys.executable, "jobs/check.py", str(tiny_bundle.path), "--device", "cpu", "--vision-device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "equal tokens" in done.stdout


@pytest.mark.parametrize(
    ("name", "failed"), [(VISION, ["vision"]), (DECODER, ["decoder"]), (DECODER_GUIDED, ["guided decoder"])]
)
def test_check_shows_what_is_wrong_and_fails(name, failed, saturating, tiny_bundle, capsys, monkeypatch):
    saturating(name)
    monkeypatch.setattr(sys, "argv", ["check.py", str(tiny_bundle.path)])
    assert check.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("│")[1].strip() for line in lines if "✗" in line} == set(failed)
    wrong = [line.removeprefix("wrong").split(":")[0].strip() for line in lines if line.startswith("wrong")]
    assert wrong == failed


def test_what_cannot_be_checked_is_refused(copied_bundle, tmp_path, capsys, monkeypatch):
    forget_known_answers(copied_bundle)
    for options, message in (
        ([copied_bundle], "has no known answers, as it was exported with --skip-parity: export the checkpoint again"),
        ([tmp_path / "nothing"], "is no bundle"),
        ([copied_bundle, "--device", "gpu"], ""),
    ):
        monkeypatch.setattr(sys, "argv", ["check.py", *map(str, options)])
        if message:
            assert check.main() == 1
            error = capsys.readouterr().err
            assert error.startswith("check: ")
            assert message in error
        else:
            with pytest.raises(SystemExit):
                check.main()


def test_a_wrong_vision_graph_is_refused_before_an_image(saturating, tiny_bundle):
    saturating()
    with pytest.raises(DeviceError) as refusal:
        VisionEncoder(tiny_bundle, threads=2)
    said = str(refusal.value)
    assert said.startswith(WRONG.format("vision", "features"))
    for part in ("(allowed: 1.0e-04)", devices.processor(), "jobs/check.py", "export with another --dtype"):
        assert part in said
    assert "\n" not in said


def test_a_wrong_decoder_graph_is_refused_before_a_row(saturating, tiny_bundle):
    saturating()
    with pytest.raises(DeviceError, match=WRONG.format("decoder", "logits")):
        Decoder(tiny_bundle, 2, threads=2)
    assert not any(figure.is_within for figure in Decoder(tiny_bundle, 2, threads=2, prove=False).figures())


@pytest.mark.parametrize(("name", "graph"), [(VISION, "vision"), (DECODER_DRAWN, "decoder")])
def test_a_captioner_of_a_wrong_graph_is_not_made(name, graph, saturating, tiny_bundle):
    saturating(name)
    with pytest.raises(DeviceError, match=f"this machine computes the {graph} graph wrongly"):
        Captioner(tiny_bundle.path)


@pytest.mark.long
@pytest.mark.parametrize(("name", "graph"), [(VISION, "vision"), (DECODER, "decoder")])
def test_a_job_whose_machines_compute_wrongly_answers_nothing(name, graph, tiny_bundle, ray_env, tmp_path):
    path = os.pathsep.join([str(ROOT / "tests" / "saturating"), str(ROOT)])
    command = [sys.executable, "jobs/caption.py", "--bundle", tiny_bundle.path, "--input", QUESTIONS]
    command += ["--output", tmp_path / "out", "--limit", 4, "--vision-cache", tmp_path / "features"]
    env = ray_env | {"PYTHONPATH": path, "QVL_SATURATES": name}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"caption: this machine computes the {graph} graph wrongly: ")
    assert session.ORT_VERSION in last
    assert not list((tmp_path / "out").glob("part-*"))
    if name == VISION:
        assert not [path for path in (tmp_path / "features").rglob("*") if path.is_file()]


def test_a_graph_in_fp32_for_failed_rows_is_proved_too(saturating, copied_bundle, tiny_bundle):
    bundle, config = add_fp32(copied_bundle, tiny_bundle), check.CheckConfig(bundle=copied_bundle)
    assert [each.graph for each in check.check(config, bundle)] == [
        "vision",
        "decoder",
        "guided decoder",
        "drawn decoder",
        "vision in fp32",
        "decoder in fp32",
        "guided decoder in fp32",
        "drawn decoder in fp32",
    ]
    spoil(copied_bundle, VISION, "vision.blocks.1.mlp.down")
    forget_known_answers(copied_bundle)  # with them, it would be refused itself
    vision = VisionEncoder(Bundle.load(copied_bundle), threads=2)
    saturating()
    with pytest.raises(DeviceError):
        vision.encode(KnownAnswers.of(tiny_bundle).pixels)


def test_a_decoder_answers_as_if_it_had_not_been_proved(tiny_bundle):
    known = KnownAnswers.of(tiny_bundle)
    row = PrefillRow(known.input_ids.tolist())
    decoders = [Decoder(tiny_bundle, 2, 2, keep_logits=True, prove=prove) for prove in (True, False)]
    for decoder in decoders:
        decoder.prefill(0, [row, row])
        decoder.step(np.array([5, 6]))
    assert (decoders[0].logits == decoders[1].logits).all()


def test_a_bundle_exported_without_the_gate_runs_and_has_nothing_to_check(tmp_path):
    config = ExportConfig(checkpoint=TINY, output=tmp_path / "bundle", skip_parity=True)
    manifest = export_bundle(config, traces=TRACES)
    assert (manifest.parity, manifest.tolerance) == (None, None)
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.manifest.parity is None
    assert KNOWN_ANSWERS not in manifest.files
    assert VisionEncoder(bundle, threads=1).figures() == Decoder(bundle, 1, threads=1).figures() == []


def test_a_job_says_that_nobody_can_tell_whether_its_machines_compute_right(copied_bundle, tiny_bundle, tmp_path):
    pq.write_table(pq.read_table(QUESTIONS).slice(0, 0), tmp_path / "none.parquet")
    forget_known_answers(copied_bundle)
    for bundle, times in ((copied_bundle, 1), (tiny_bundle.path, 0)):
        config = CaptionConfig(
            bundle=bundle, input=(str(tmp_path / "none.parquet"),), output=str(tmp_path / f"{times}")
        )
        said = []
        run(config, said.append)
        assert sum("it was exported with --skip-parity" in line for line in said) == times


def test_features_of_machines_that_nobody_checked_are_kept_apart(tiny_bundle, tmp_path):
    unchecked = dataclasses.replace(tiny_bundle.manifest, tolerance=None)
    checked = [open_vision_cache(tmp_path, 1, manifest) for manifest in (tiny_bundle.manifest, unchecked)]
    features = np.ones((7, 128), np.float32)
    checked[1].put(b"key", features)
    assert checked[0].get(b"key", 7) is None
    assert (checked[1].get(b"key", 7) == features).all()


@pytest.mark.parametrize("damage", [lambda data: data[:500], lambda _: b"", lambda _: b"PK"])
def test_known_answers_that_cannot_be_read_are_named(damage, copied_bundle):
    file = copied_bundle / KNOWN_ANSWERS
    file.write_bytes(damage(file.read_bytes()))
    seal(copied_bundle)
    with pytest.raises(BundleError, match=f"{KNOWN_ANSWERS} cannot be read"):
        VisionEncoder(Bundle.load(copied_bundle), threads=1)


def test_a_figure_that_is_no_number_is_out_of_bounds():
    assert not Figure("error", math.nan, 1.0).is_within
    assert not Figure("cosine", math.nan, 0.5, at_least=True).is_within
    assert str(Figure("error", math.nan, 1e-4)) == "error nan (allowed: 1.0e-04)"
    assert [digits(value) for value in (7, 3e-7, 1 - 2e-6, 0.5)] == ["7", "3.0e-07", "1 - 2.0e-06", "5.0e-01"]


def test_answers_are_held_to_tokens_that_an_allowed_error_cannot_change(tiny_bundle):
    known, tolerance = KnownAnswers.of(tiny_bundle), tiny_bundle.manifest.tolerance
    tie = dataclasses.replace(known, is_decided=np.arange(STEPS) != 2)
    other = known.following.copy()
    other[2] += 1
    assert all(figure.is_within for figure in tie.of_decoder(known.logits, other, tolerance))
    assert not all(figure.is_within for figure in known.of_decoder(known.logits, other, tolerance))
