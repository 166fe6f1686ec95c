"""A bundle answers like its checkpoint, whatever its shape, or there is no bundle."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checkpoints import make_checkpoint
from conftest import ROOT, TINY, TRACES
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import export.decoder
import export.vision
from export.checkpoint import load_checkpoint
from export.config import ExportConfig
from export.decoder import FullDecoder
from export.graphs import Traces
from export.package import export_bundle
from export.progress import Progress
from export.vision import split_windows
from qvl_batch.bundle.layout import PlacedImage, mrope_positions
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, DECODER_DRAWN, DECODER_FULL, DECODER_GUIDED, KNOWN_ANSWERS, VISION
from qvl_batch.errors import ExportError

SHAPES = {
    # untied head, heads of 16, one key-value head for four, all blocks but one windowed, an image of two parts
    # whose windows at the edge are smaller
    "untied": (
        {"tie_word_embeddings": False, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1,
         "num_hidden_layers": 2, "intermediate_size": 96, "rope_theta": 1e6,
         "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        {"depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 80, "fullatt_block_indexes": [1]},
        364,
    ),
    # no grouping of heads, heads of 40, no full block at all, one vision head, windows cut at the edge
    "no full block": (
        {"hidden_size": 80, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3,
         "intermediate_size": 112, "rms_norm_eps": 1e-5,
         "rope_scaling": {"type": "mrope", "mrope_section": [6, 7, 7]}},
        {"depth": 2, "hidden_size": 32, "num_heads": 1, "intermediate_size": 48, "fullatt_block_indexes": []},
        252,
    ),
    # rows longer than those of the training
    "yarn": (
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
         "intermediate_size": 96,
         "rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3], "factor": 4.0,
                          "original_max_position_embeddings": 64}},
        {"depth": 2, "hidden_size": 32, "num_heads": 1, "intermediate_size": 48, "fullatt_block_indexes": [0]},
        140,
    ),
    # every block full, windows of another size, twelve heads over four
    "all full": (
        {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 1,
         "intermediate_size": 64, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]}},
        {"depth": 2, "hidden_size": 48, "num_heads": 3, "intermediate_size": 64, "fullatt_block_indexes": [0, 1],
         "window_size": 56},
        140,
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", SHAPES)
def test_any_shape_passes_the_parity_gate(name, tmp_path):
    text, vision, size = SHAPES[name]
    checkpoint = make_checkpoint(tmp_path / "checkpoint", text=text, vision=vision)
    config = ExportConfig(checkpoint=checkpoint, output=tmp_path / "bundle", image_size=size, max_seq_len=256)
    manifest = export_bundle(config)
    assert manifest.parity is not None
    assert manifest.parity.tokens_equal == manifest.parity.tokens == 3 * 32
    assert max(manifest.parity.features, manifest.parity.logits) < 1e-4
    assert manifest.layout.resolution.max_tokens == (size // 28) ** 2
    assert Bundle.load(tmp_path / "bundle").manifest == manifest


def test_parts_of_an_image_are_whole_windows_in_order():
    assert split_windows([(36, 64)], 576) == [[(9, 64)]] * 4
    assert split_windows([(9, 64), (6, 16), (1, 4)], 576) == [[(9, 64)], [(6, 16), (1, 4)]]
    assert split_windows([(3, 64), (2, 16)], 100) == [[(1, 64)], [(1, 64)], [(1, 64), (2, 16)]]
    assert split_windows([(2, 64)], 16) == [[(1, 64)]] * 2


def test_weights_of_all_decoders_are_on_disk_once(tiny_bundle):
    files = {path.name for path in tiny_bundle.path.glob("*.onnx*")}
    assert files == {VISION, f"{VISION}.data", DECODER, f"{DECODER}.data", DECODER_GUIDED, DECODER_DRAWN, DECODER_FULL}
    for name in (DECODER_GUIDED, DECODER_DRAWN, DECODER_FULL):
        assert (tiny_bundle.path / name).stat().st_size < 200_000


def test_the_plain_contract_graph_has_no_contrib_operators(tiny_bundle):
    graph = onnx.load(tiny_bundle.path / DECODER_FULL, load_external_data=False)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [value.name for value in graph.graph.input] == ["input_ids", "attention_mask", "image_embeds"]


def test_graphs_hold_no_paths_of_the_machine_they_were_made_on(tiny_bundle):
    for path in tiny_bundle.path.glob("*.onnx"):
        assert b"site-packages" not in path.read_bytes()
        assert str(ROOT).encode() not in path.read_bytes()


def test_a_bundle_can_be_moved(tiny_bundle, tmp_path):
    moved = shutil.copytree(tiny_bundle.path, tmp_path / "elsewhere")
    assert str(tiny_bundle.path) not in (moved / "bundle.json").read_text()
    assert Bundle.load(moved).sha256 == tiny_bundle.sha256


def test_positions_in_the_graph_are_those_of_transformers():
    model = load_checkpoint(TINY).model
    full = FullDecoder(model, merged_side=4)
    image = [model.config.image_token_id] * 16
    rows = [[5, 6, 7, *image, 8, 9], [5, *image, 6, 7], [5, 6, 7, 8]]
    assert len(image) == full.merged_side**2
    ids = torch.zeros((3, 24), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        side = slice(0, len(row)) if index else slice(24 - len(row), 24)  # the first is padded on the left
        ids[index, side], mask[index, side] = torch.tensor(row), 1
    is_image = (ids == model.config.image_token_id).int()
    grid = torch.tensor([[1, 8, 8]] * 2)
    expected, _ = model.model.get_rope_index(ids, is_image, image_grid_thw=grid, attention_mask=mask)
    valid = mask.bool()
    is_image, positions = full.image_and_positions(ids, mask)  # not outputs of the graph
    assert torch.equal(positions[:, valid], expected[:, valid])
    assert torch.equal(is_image, ids == model.config.image_token_id)


@pytest.mark.parametrize("seed", range(40))
def test_positions_of_any_images_are_those_of_transformers(seed):
    chance = np.random.default_rng(seed)
    config = Qwen2_5_VLConfig.from_pretrained(TINY)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config)  # noqa: SLF001  (no public way)
    ids, images = [], []
    for _ in range(int(chance.integers(5))):
        ids += [5] * int(chance.integers(1, 9))  # images that touch would be one to transformers
        images.append(PlacedImage(len(ids), *chance.integers(1, 12, 2).tolist()))
        ids += [config.image_token_id] * images[-1].tokens
    ids += [5] * int(chance.integers(1, 9))
    grid = torch.tensor([[1, 2 * image.rows, 2 * image.columns] for image in images]) if images else None
    row = torch.tensor([ids])
    expected, delta = model.model.get_rope_index(row, (row == config.image_token_id).int(), image_grid_thw=grid)
    found = mrope_positions(len(ids), images)
    assert np.array_equal(found, expected[:, 0].numpy())
    assert found[0, -1] - (len(ids) - 1) == delta.item()


def _one_dimensional(mrope_section):
    return torch.zeros(sum(mrope_section), dtype=torch.int64)


def _raster_order(grid, config):
    del config
    tokens = int(grid[0, 1] * grid[0, 2])
    return torch.arange(tokens // 4), [(tokens // 64, 64)]


@pytest.mark.parametrize(
    ("module", "function", "wrong", "right", "message"),
    [
        pytest.param(
            export.decoder,
            "_axis_of_frequency",  # private: a mistake inside the graph
            _one_dimensional,
            "trace_vision",
            "logits are off by",
            id="positions of one dimension",
            marks=pytest.mark.long,
        ),
        pytest.param(
            export.vision,
            "window_order",
            _raster_order,
            "trace_decoder",
            "vision features are off by",
            id="windows in raster order",
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_gate_refuses_wrong_graphs_and_leaves_nothing(
    module, function, wrong, right, message, monkeypatch, tmp_path
):
    class OfRightGraphs(Traces):
        def once(self, trace, *made_of):
            return (TRACES if trace.__name__ == right else super()).once(trace, *made_of)

    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(ExportError, match=message):
        export_bundle(ExportConfig(checkpoint=TINY, output=tmp_path / "bundle"), traces=OfRightGraphs())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_trace_is_not_changed_by_exports_that_use_it(tiny_bundle, tmp_path):
    hashes = [_hashes(tiny_bundle)]
    for dtype in ("int8", "bf16", "bf16", "int8", "fp32"):
        output = tmp_path / str(len(hashes))
        config = ExportConfig(checkpoint=TINY, output=output, dtype=dtype, skip_parity=True)
        export_bundle(config, traces=TRACES)
        hashes.append(_hashes(Bundle.load(output)))
    assert hashes == hashes[::-1]


def _hashes(bundle: Bundle) -> dict[str, str]:
    # Without the gate there are no known answers.
    return {name: file.sha256 for name, file in bundle.manifest.files.items() if name != KNOWN_ANSWERS}


def _nothing(checkpoint: Path) -> None:
    del checkpoint


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _processor(**changes):
    """Changes settings of the image processor."""
    return lambda path: _edit(path / "preprocessor_config.json", **changes)


def _sizes(**size):
    return _processor(min_pixels=None, max_pixels=None, size=size)


def _without(*names):
    return lambda path: [(path / name).unlink() for name in names]


def _adapter_alone(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}')


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (shutil.rmtree, {}, "is not a directory"),
        (lambda path: (path / "config.json").unlink(), {}, "is not a checkpoint"),
        (lambda path: (path / "config.json").write_text("{"), {}, "is not a checkpoint"),
        (lambda path: _edit(path / "config.json", model_type="qwen2_vl"), {}, "is a qwen2_vl checkpoint"),
        (lambda path: _edit(path / "config.json", hidden_act="gelu"), {}, "hidden_act is gelu"),
        (lambda path: (path / "model.safetensors").unlink(), {}, "has no .*safetensors"),
        (lambda path: (path / "preprocessor_config.json").unlink(), {}, "lacks preprocessor_config.json: copy it from"),
        (lambda path: (path / "preprocessor_config.json").write_text("{"), {}, "image processor cannot be loaded: "),
        (
            _without("tokenizer.json", "vocab.json"),
            {},
            "lacks tokenizer.json: copy it from the checkpoint that this",
        ),
        (
            lambda path: _edit(path / "config.json", rope_scaling={"type": "dynamic", "factor": 2.0}),
            {},
            "rope_type is dynamic; only default, linear, llama3, yarn are supported",
        ),
        (lambda path: _edit(path / "tokenizer_config.json", chat_template=None), {}, "has no chat template"),
        (lambda path: _edit(path / "tokenizer_config.json", chat_template="{{ messages }}"), {}, "chat template must"),
        (
            lambda path: _edit(path / "tokenizer_config.json", clean_up_tokenization_spaces=True),
            {},
            "clean_up_tokenization_spaces",
        ),
        (
            lambda path: _edit(path / "config.json", quantization_config={"quant_method": "hqq"}),
            {},
            r"quantized \(hqq\); awq of 4 bits, .* can be read: export the checkpoint that it was made from",
        ),
        (
            lambda path: (path / "adapter_config.json").write_text("{}"),
            {},
            r"holds weights and an adapter \(adapter_config.json\), which may be merged or not",
        ),
        (_adapter_alone, {}, r"holds an adapter of Qwen/Qwen2.5-VL-3B-Instruct \(adapter_config.json\): give that"),
        (_processor(do_normalize=False), {}, "do_normalize of the image processor is False; only True is supported"),
        (_processor(rescale_factor=1.0), {}, "rescale_factor of the image processor is 1.0; only 0.0039"),
        (_sizes(shortest_edge=None, longest_edge=9), {}, "is {'longest_edge': 9}, with which transformers takes no"),
        (_sizes(height=9, width=9), {}, "is {'height': 9, 'width': 9}, with .* must have min_pixels and max_pixels"),
        (_sizes(max_pixels=9, min_pixels=8), {}, "is {'min_pixels': 8, 'max_pixels': 9}, with which transformers"),
        (_processor(max_pixels=400_000), {}, "takes 3136 to 400000 pixels: give at most --image-size 616, or"),
        (_processor(max_pixels=3300), {}, "takes 3136 to 3300 pixels: give at most --image-size 56, or --image"),
        (_processor(min_pixels=3200, max_pixels=3300), {}, "takes 3200 to 3300 pixels: give --image-size native"),
        (
            lambda path: _edit(path / "generation_config.json", eos_token_id=[]),
            {},
            "has no end token",
        ),
        (
            lambda path: _edit(path / "tokenizer_config.json", chat_template="{{ 1 + '' }}"),
            {},
            "fails on a turn of an image",
        ),
        (lambda path: (path / "chat_template.json").write_text("{}"), {}, "chat_template.json has no chat template"),
        (_nothing, {"image_size": 650}, "--image-size 650 is not a multiple of 28"),
        (_nothing, {"image_size": 0}, "--image-size 0 is not a multiple"),
        (_nothing, {"image_size": 28}, "image processor would resize it"),
        (_nothing, {"max_seq_len": 600}, "--max-seq-len 600 leaves"),
        (_nothing, {"max_seq_len": 5000}, "is more than the 4096 positions"),
        (_nothing, {"max_pixels": 10_000}, "--max-pixels is for --image-size native"),
        (_nothing, {"image_size": "native", "min_pixels": 500}, "--min-pixels 500 and --max-pixels .* at least 784"),
        (_nothing, {"image_size": "native", "max_pixels": 3000}, "--min-pixels 3136 and --max-pixels 3000"),
        (_nothing, {"image_size": "native", "max_pixels": 4_000_000}, "--max-seq-len 4096 leaves"),
        (
            lambda path: _edit(path / "tokenizer_config.json", chat_template="{{ messages[0].content[1].text }}"),
            {},
            "chat template must produce one",
        ),
    ],
)
def test_wrong_input_is_refused_in_one_line_and_leaves_nothing(damage, options, message, tmp_path):
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    damage(checkpoint)
    with pytest.raises(ExportError, match=message) as refused:
        export_bundle(ExportConfig(checkpoint=checkpoint, output=tmp_path / "out" / "bundle", **options))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_new_tokens", 8), ("no_repeat_ngram_size", 1), ("num_beams", 2), ("suppress_tokens", [5]),
        ("bad_words_ids", [[5]]), ("forced_eos_token_id", 5), ("guidance_scale", 1.5), ("stop_strings", ["a"]),
    ],
)  # fmt: skip
def test_settings_under_which_generate_is_not_greedy_are_refused(name, value, tmp_path):
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    _edit(checkpoint / "generation_config.json", **{name: value})
    with pytest.raises(ExportError, match=f"the generation config sets {name} to .*: remove the setting"):
        load_checkpoint(checkpoint)


def test_settings_that_greedy_decoding_does_not_look_at_are_none_of_ours(tmp_path):
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    sampling = {"do_sample": True, "temperature": 1e-6, "top_k": 1, "top_p": 0.001}
    _edit(checkpoint / "generation_config.json", **sampling, num_beams=1, min_length=0, guidance_scale=1.0)
    assert load_checkpoint(checkpoint).generation == load_checkpoint(TINY).generation


def test_without_a_generation_config_the_model_has_the_settings(tmp_path):
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    (checkpoint / "generation_config.json").unlink()
    _edit(checkpoint / "config.json", repetition_penalty=1.05)
    found = load_checkpoint(checkpoint)
    assert found.generation.repetition_penalty == found.model.generation_config.repetition_penalty == 1.05


def test_the_processors_own_template_goes_before_the_tokenizers(tmp_path):
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    template = load_checkpoint(TINY).tokenizer.chat_template
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": f"The {template}"}))
    assert load_checkpoint(checkpoint).tokenizer.chat_template == f"The {template}"
    (checkpoint / "chat_template.jinja").write_text(template)
    assert load_checkpoint(checkpoint).tokenizer.chat_template == template


def test_a_checkpoint_may_ask_for_another_implementation_of_attention(tmp_path):
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    _edit(checkpoint / "config.json", _attn_implementation="flash_attention_2")
    found = load_checkpoint(checkpoint).model.config._attn_implementation  # noqa: SLF001  (no public name)
    assert found == "sdpa"


def test_what_came_to_the_output_meanwhile_is_kept(tmp_path):
    output = tmp_path / "bundle"

    class Meanwhile(Progress):
        def step(self, name):
            output.mkdir(exist_ok=True)
            (output / "precious").write_text(name)
            return super().step(name)

    config = ExportConfig(checkpoint=TINY, output=output, skip_parity=True)
    with pytest.raises(ExportError, match="exists: give another --output"):
        export_bundle(config, Meanwhile(), TRACES)
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "precious"]


def test_a_read_only_checkpoint_can_be_exported(tmp_path):
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    for file in checkpoint.iterdir():
        file.chmod(0o444)
    export_bundle(ExportConfig(checkpoint=checkpoint, output=tmp_path / "bundle", skip_parity=True), traces=TRACES)
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "bundle").iterdir())


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    _edit(checkpoint / "config.json", num_hidden_layers=5, max_window_layers=5)
    with pytest.raises(ExportError, match=r"lacks 12 weights, the first of them model\.language_model\.layers\.4"):
        export_bundle(ExportConfig(checkpoint=checkpoint, output=tmp_path / "bundle"))


def test_an_existing_bundle_is_kept_unless_told_otherwise(copied_bundle):
    before = (copied_bundle / "bundle.json").read_text()
    with pytest.raises(ExportError, match="exists: give another --output, or --overwrite"):
        export_bundle(ExportConfig(checkpoint=TINY, output=copied_bundle))
    assert (copied_bundle / "bundle.json").read_text() == before


def test_a_folder_that_is_no_bundle_is_never_overwritten(tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ExportError, match="is not a bundle, so it is not overwritten"):
        export_bundle(ExportConfig(checkpoint=TINY, output=tmp_path, overwrite=True))
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_command_prints_one_line_for_an_expected_error(tmp_path):
    command = [sys.executable, "-m", "export", str(tmp_path / "nothing"), "--output", str(tmp_path / "bundle")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("export: ")
    assert "Traceback" not in result.stderr
