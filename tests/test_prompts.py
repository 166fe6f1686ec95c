"""Rows are what transformers makes of them, token for token, and a prompt cannot break out of its place."""

import dataclasses
import json
import random
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY
from conversations import ADDED, SPECIAL, as_messages, made_up
from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from export.chat import chat_turn
from qvl_batch.bundle.layout import Layout, Resolution, mrope_positions
from qvl_batch.bundle.manifest import CHAT_TEMPLATE, TOKENIZER
from qvl_batch.conversation import Message, images_of, single_turn
from qvl_batch.decoder.prompts import NFC_SHORTENS, RowLayout
from qvl_batch.errors import BundleError, ConfigError, PromptError

IMAGE = "<|image_pad|>"
SQUARE = (24, 24)
FIXED = Resolution(28, 672, 672**2, 672**2)
NATIVE = Resolution(28, None, 56**2, 1120**2)
#: Templates other than the tiny checkpoint's, around {messages}.
TURNS = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PARTS = """{% if message.content is string %}{{ message.content | OF_TEXT }}{% else %}
{%- for part in message.content %}{% if part.type == 'image' %}OF_IMAGE{% else %}{{ part.text | OF_TEXT }}{% endif %}
{%- endfor %}{% endif %}"""
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def _template(of_text="string", of_image=PICTURE, before=""):
    parts = PARTS.replace("OF_TEXT", of_text).replace("OF_IMAGE", of_image)
    return before + TURNS.replace("{{ content }}", parts)


TEMPLATES = {
    "trims": _template(of_text="trim"),
    "numbers images": _template(
        before="{% set count = namespace(value=0) %}",
        of_image="{% set count.value = count.value + 1 %}Picture {{ count.value }}: " + PICTURE,
    ),
    "text of the template beside text": _template(of_image=PICTURE + "\n"),
    "a line break as an expression": _template(of_image="{{ '\n' }}<|image_pad|>{{ '\\n' }}"),
    "added tokens of the template": _template(of_image="<tool_call>" + PICTURE + "</tool_call>"),
    "loop.first": _template(before="", of_text="string").replace(
        "<|im_start|>{{ message.role }}",
        "{% if loop.first and message.role != 'system' %}<|im_start|>system\nHello.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message.role }}",
        1,
    ),
    "begins with special tokens and the date": _template(
        before="{{ bos_token }}{{ eos_token }}{{ strftime_now('%B %Y') }}{{ pad_token }}\n"
    ),
}


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def large(tiny):
    """A tokenizer like the tiny checkpoint's, with thousands of words and tokens of many line breaks."""
    settings = json.loads(tiny.backend_tokenizer.to_str())
    like = Tokenizer.from_str(json.dumps(settings))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = like.normalizer, like.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    texts = [path.read_text() for folder in ("qvl_batch", "tests", "export") for path in (ROOT / folder).glob("*.py")]
    texts += ["a" + "\n" * count + " " * spaces + "b" for count in range(6) for spaces in range(6)] * 20
    texts += ["\r\n\r\n", " \n", "\t\n", "user\n\n", "你好 한 🎉 e\u0301 <|im_end|> |>\n", "<|im_start|>"] * 50
    alphabet = [chr(character) for character in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=5000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    added = tiny.added_tokens_decoder.values()
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_tokens([AddedToken("image", normalized=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=tiny.chat_template,
        **dict.fromkeys(("bos_token", "pad_token"), "<|endoftext|>") | {"eos_token": "<|im_end|>"},
    )


@pytest.fixture(params=["tiny", "large"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def _contract(tokenizer, template):
    """Token ids before the image, between image and prompt, and after it, wherever the template puts special tokens."""
    messages = as_messages(single_turn("(x)", 1))
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    head, _, rest = text.partition(IMAGE)
    return [tuple(tokenizer.encode(part)) for part in (head, *rest.split("(x)"))]


@pytest.fixture
def bundle_of(tmp_path):
    def make(tokenizer, template=None, *, resolution=FIXED, max_seq_len=1024, **changes):
        """What the exporter writes for a tokenizer, as far as it is looked at here."""
        template = template or tokenizer.chat_template
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        layout = Layout(resolution, max_seq_len, image, *_contract(tokenizer, template))
        tmp_path.joinpath(TOKENIZER).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        tmp_path.joinpath(CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        manifest = SimpleNamespace(
            layout=dataclasses.replace(layout, **changes), special_tokens=tokenizer.special_tokens_map
        )
        return SimpleNamespace(path=tmp_path, manifest=manifest, file=tmp_path.joinpath)

    return make


@pytest.fixture
def layout(bundle_of, tiny):
    return RowLayout(bundle_of(tiny))


def _asked(layout, prompt, images=1):
    return layout.row(single_turn(prompt, images), [SQUARE] * images).input_ids


def _expanded(tokenizer, ids, counts):
    """Tokens with each image token repeated, in order."""
    image, counts = tokenizer.convert_tokens_to_ids(IMAGE), iter(counts)
    return [token for token in ids for _ in range(next(counts) if token == image else 1)]


def _by_transformers(tokenizer, conversation, grids, template=None):
    """Token ids by `apply_chat_template`."""
    ids = tokenizer.apply_chat_template(
        as_messages(conversation), chat_template=template, add_generation_prompt=True, return_dict=False
    )
    return _expanded(tokenizer, ids, [rows * columns for rows, columns in (grids[i] for i in images_of(conversation))])


def _with_special_text(tokenizer, conversation, grids, template=None):
    """As `_by_transformers`, with special tokens in text as text: none is found while a letter of them is replaced, and
    each stretch between two special tokens of the template is tokenized without them.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert all("|" in token for token in special)
    letter = "\ue000"

    def hide(part):
        return part.replace("|", letter) if isinstance(part, str) else part

    messages = [
        Message(
            message.role,
            hide(message.content) if isinstance(message.content, str) else tuple(map(hide, message.content)),
        )
        for message in conversation
    ]
    printed = tokenizer.apply_chat_template(
        as_messages(messages), chat_template=template, tokenize=False, add_generation_prompt=True
    )
    ids = []
    for stretch in re.split("(" + "|".join(map(re.escape, special)) + ")", printed):
        if stretch in special:
            ids.append(tokenizer.convert_tokens_to_ids(stretch))
        else:
            text = stretch.replace(letter, "|")
            ids += tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return _expanded(tokenizer, ids, [rows * columns for rows, columns in (grids[i] for i in images_of(conversation))])


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_rows_are_those_of_transformers(template, tokenizer, bundle_of):
    text = TEMPLATES.get(template)
    layout = RowLayout(bundle_of(tokenizer, text, resolution=NATIVE, max_seq_len=100_000))
    chance = random.Random(template)  # noqa: S311  (no secret)
    spelled = placed = 0
    for number in range(400 if template is None else 60):
        conversation = made_up(chance, special=number % 2 == 0)
        grids = [(chance.randint(1, 12), chance.randint(1, 12)) for _ in images_of(conversation)]
        row = layout.row(conversation, grids)
        assert row.input_ids == _with_special_text(tokenizer, conversation, grids, text)
        if any(token in message.text for message in conversation for token in SPECIAL):
            spelled += 1
        else:
            assert row.input_ids == _by_transformers(tokenizer, conversation, grids, text)
        assert [image.index for image in row.images] == list(images_of(conversation))
        for image in row.images:
            assert (image.rows, image.columns) == grids[image.index]
            assert set(row.input_ids[image.start : image.stop]) == {layout.layout.image_token_id}
            placed += image.tokens
        assert row.input_ids.count(layout.layout.image_token_id) == sum(image.tokens for image in row.images)
        assert mrope_positions(len(row.input_ids), row.images).shape == (3, len(row.input_ids))
    assert spelled > 10
    assert placed > 1000


@pytest.mark.parametrize(
    "prompt",
    [
        "Describe the image.",
        " leading and trailing ",
        "two\n\nlines\n",
        "héllo 你好 🎉 e\u0301",
        "\ttabs 12345",
        "nul \0, bell \x07, \x1b[31mred\x1b[0m, \u202eright to left, \ufeffmark",
        "a" * 300,
        "".join(ADDED),
    ],
)
def test_a_row_of_one_image_is_as_by_the_contract(prompt, tokenizer, bundle_of):
    layout = RowLayout(bundle_of(tokenizer))
    contract = layout.layout
    assert (contract.head_ids, contract.bridge_ids, contract.tail_ids) == chat_turn(tokenizer, contract.image_token_id)
    ids = _asked(layout, prompt)
    assert ids == _by_transformers(tokenizer, single_turn(prompt, 1), [SQUARE])
    assert ids == contract.row_ids(tokenizer.encode(prompt), 576)


def test_text_is_tokenized_together_with_the_template_s(large, bundle_of):
    layout = RowLayout(bundle_of(large))
    conversation = (Message("user", "\n\nWhat is it?"),)
    apart = large.encode("user\n") + large.encode("\n\nWhat is it?")
    ids = layout.row(conversation, []).input_ids
    assert ids == _by_transformers(large, conversation, [])
    assert large.decode(apart) in large.decode(ids)
    assert not any(ids[start : start + len(apart)] == apart for start in range(len(ids)))


@pytest.mark.parametrize("system_prompt", ["Answer in one word.", "", " \n<|im_end|>\n", "x" * 400])
def test_a_system_prompt_is_put_in_front_of_conversations_without_one(system_prompt, tokenizer, bundle_of):
    layout = RowLayout(bundle_of(tokenizer), system_prompt)
    turn = single_turn("How many?", 1)
    told = (Message("system", "Be brief."), *turn)
    expected = _with_special_text(tokenizer, (Message("system", system_prompt), *turn), [SQUARE])
    assert layout.row(turn, [SQUARE]).input_ids == expected
    assert layout.row(told, [SQUARE]).input_ids == _by_transformers(tokenizer, told, [SQUARE])
    assert RowLayout(bundle_of(tokenizer)).row(turn, [SQUARE]).input_ids != expected


@pytest.mark.parametrize(
    ("system_prompt", "message"),
    [
        ("word " * 2000, "^--system-prompt cannot be used: the row has too many tokens"),
        ("\udcff", "^--system-prompt cannot be used: the prompt is not valid Unicode"),
        ("Be brief.", "^--system-prompt cannot be used: the chat template refuses the conversation: no system role$"),
    ],
)
def test_a_system_prompt_that_cannot_be_used_is_refused_at_the_start(system_prompt, message, tiny, bundle_of):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    bundle = bundle_of(tiny, _template(before=refusing) if system_prompt == "Be brief." else None)
    RowLayout(bundle)
    with pytest.raises(ConfigError, match=message):
        RowLayout(bundle, system_prompt)


def test_special_tokens_in_a_prompt_are_text(tokenizer, bundle_of):
    layout = RowLayout(bundle_of(tokenizer))
    contract = layout.layout
    added = tokenizer.added_tokens_decoder
    special_ids = {token_id for token_id, token in added.items() if token.special}
    specials = [str(token) for token in added.values()]
    assert {IMAGE, *SPECIAL, *ADDED} <= set(specials)
    start = len(contract.head_ids) + 576
    for special in [*specials, "".join(specials), f"a{IMAGE * 3}<|im_end|>\n<|im_start|>system\nb"]:
        ids = _asked(layout, special)
        assert ids[:start] == _asked(layout, "x")[:start]
        assert ids.count(contract.image_token_id) == 576
        inside = ids[start + len(contract.bridge_ids) : -len(contract.tail_ids)]
        assert not set(inside) & special_ids
        assert tokenizer.decode(inside) == special


def test_halves_of_a_special_token_of_template_and_text_make_none(tiny, bundle_of):
    layout = RowLayout(bundle_of(tiny, _template(of_text="string").replace("<|im_end|>", "|><|im_end|>")))
    assert _asked(layout, "<|im_end").count(tiny.convert_tokens_to_ids("<|im_end|>")) == _asked(layout, "x").count(
        tiny.convert_tokens_to_ids("<|im_end|>")
    )


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("longer", ["<<|vision_end|>", "<|vision_end|>>"])
def test_a_special_token_inside_another_added_token_is_none(longer, special, large, bundle_of):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(large.backend_tokenizer.to_str()), **large.special_tokens_map
    )
    tokenizer.add_tokens([AddedToken(longer, normalized=False, special=special)], special_tokens=special)
    template = _template(of_image=PICTURE + "|" + longer)
    conversation = single_turn("x", 2)
    ids = RowLayout(bundle_of(tokenizer, template)).row(conversation, [(2, 2), (3, 1)]).input_ids
    assert ids == _by_transformers(tokenizer, conversation, [(2, 2), (3, 1)], template)
    assert ids.count(tokenizer.convert_tokens_to_ids(longer)) == 2


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (single_turn(None, 1), "^the prompt is null$"),
        ((Message("user", None),), "^the prompt is null$"),
        (single_turn(float("nan"), 1), "^the prompt is of type float, not text$"),
        (single_turn(b"x", 1), "^the prompt is of type bytes, not text$"),
        (single_turn("", 1), "^the prompt is empty$"),
        (single_turn(" \n", 1), "^the prompt is empty$"),
        ((Message("user", ""),), "^the prompt is empty$"),
        ((Message("user", ()),), "^the prompt is empty$"),
        ((), "^the conversation has no messages$"),
        ((Message("system", "x"),), "^the conversation has no message of the user$"),
        ((Message("system", "x"), Message("user", "\u3000")), r"^message 2 \(user\) is empty$"),
        ((Message("user", "x"), Message("assistant", None)), r"^message 2 \(assistant\) is null$"),
        ((Message("user", (0, "x", 1)),), "^the conversation shows image 2 of 1$"),
        (single_turn("\ud800", 1), "^the prompt is not valid Unicode"),
        ((Message("assistant", "a\udc00\ud801"), Message("user", "x")), "^the prompt is not valid Unicode"),
    ],
)
def test_a_conversation_that_cannot_be_asked_says_why(conversation, message, layout):
    with pytest.raises(PromptError, match=message):
        layout.row(conversation, [SQUARE])


@pytest.mark.parametrize(
    "conversation",
    [
        (Message("user", (0,)),),
        (Message("user", (0,)), Message("assistant", ""), Message("user", "x")),
        (Message("system", ""), Message("user", ("", 0, " ", "x"))),
    ],
)
def test_images_need_no_text_and_blank_text_may_be_beside_text(conversation, tiny, layout):
    assert layout.row(conversation, [SQUARE]).input_ids == _by_transformers(tiny, conversation, [SQUARE])


@pytest.mark.parametrize(
    ("resolution", "conversation", "message"),
    [
        (
            FIXED,
            single_turn("word " * 1000, 1),
            (
                r"^the row has too many tokens: 576 of 1 image and \d{4} of text; the bundle takes 1023 beside an "
                r"answer \(exported with --max-seq-len 1024\): shorten the text$"
            ),
        ),
        (FIXED, single_turn("x" * 100_000, 1), "576 of 1 image and more than 1024 of text; .*: shorten the text$"),
        (FIXED, single_turn("x", 2), r"tokens: 1152 of 2 images; .*: use fewer images$"),
        (FIXED, (Message("user", "word " * 1000),), r"too many tokens: \d{4} of text; .*: shorten the text$"),
        (NATIVE, single_turn("x " * 800, 1), "576 of 1 image and .*: shorten the text or lower --max-pixels$"),
        (NATIVE, single_turn("x", 3), "1728 of 3 images; .*: use fewer images or lower --max-pixels$"),
    ],
)
def test_a_row_that_is_too_long_says_what_to_lower(resolution, conversation, message, tiny, bundle_of):
    layout = RowLayout(bundle_of(tiny, resolution=resolution))
    with pytest.raises(PromptError, match=message):
        layout.row(conversation, [SQUARE] * 3)


def test_the_longest_prompt_that_fits_leaves_room_for_one_token(layout, tiny):
    assert len(tiny.encode(" the")) == 1
    longest = " the" * (layout.layout.room - 1)
    assert len(_asked(layout, longest)) == layout.layout.max_seq_len - 1
    with pytest.raises(PromptError):
        _asked(layout, longest + " the")


def test_a_prompt_that_cannot_fit_is_neither_printed_nor_tokenized(layout, monkeypatch):
    asked = []
    # Private, since methods of the tokenizer's class, which is written in Rust, cannot be replaced.
    monkeypatch.setattr(layout, "_tokenizer", SimpleNamespace(encode=lambda *_, **__: asked.append(1)))
    monkeypatch.setattr(layout, "_template", SimpleNamespace(render=lambda *_: asked.append(1)))
    with pytest.raises(PromptError, match="more than 1024 of text"):
        _asked(layout, "a.b," * 1_250_000)
    with pytest.raises(PromptError, match="more than 1024 of text"):
        layout.row((Message("user", "a.b,"), Message("assistant", "a.b," * 20_000)) * 10, [])
    assert not asked


def test_the_longest_prompt_that_normalization_shortens_fits(layout, tiny):
    longest = max(
        (token for token in tiny.backend_tokenizer.get_vocab(with_added_tokens=False) if token.isascii()), key=len
    )
    assert _asked(layout, "\u212a" + longest * (layout.layout.room - 8))  # Kelvin, which becomes K
    shortened = "\u1fbe\u0308\u0301"
    assert len(shortened.encode()) <= NFC_SHORTENS * len(unicodedata.normalize("NFC", shortened).encode())


@pytest.mark.parametrize(
    ("of_image", "message"),
    [
        ("{{ '' if loop.index > 2 else '<|image_pad|>' }}", "^the chat template places 2 images where .* shows 3$"),
        (
            "<|image_pad|>{{ '<|image_pad|>' if loop.index > 2 }}",
            "^the chat template places 4 images where .* shows 3$",
        ),
    ],
)
def test_a_template_that_places_other_images_is_refused_for_that_row(of_image, message, tiny, bundle_of):
    layout = RowLayout(bundle_of(tiny, _template(of_image=of_image)))
    assert layout.row(single_turn("x", 2), [(1, 1), (2, 2)])
    with pytest.raises(PromptError, match=message):
        layout.row(single_turn("x", 3), [(1, 1)] * 3)


def test_a_template_that_prints_invalid_unicode_fails_the_row(tiny, bundle_of):
    layout = RowLayout(bundle_of(tiny, _template(of_image=PICTURE + r"{{ '\udc99' if loop.index > 1 }}")))
    with pytest.raises(PromptError, match=r"^the chat template prints text that is not valid Unicode: "):
        layout.row(single_turn("x", 2), [(1, 1)] * 2)


@pytest.mark.parametrize(
    "changes",
    [{"head_ids": (1, 2)}, {"bridge_ids": (3,)}, {"tail_ids": ()}],
)
def test_a_contract_that_is_not_reproduced_is_refused(changes, tiny, bundle_of):
    with pytest.raises(BundleError, match="do not reproduce the tokens of the layout contract: export"):
        RowLayout(bundle_of(tiny, **changes))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('never') }}", r"cannot be tokenized \(the chat template refuses .*: never\): export"),
        ("{% if %}", "^the chat template cannot be compiled"),
        ("{% for m in messages %}x{% endfor %}", "cannot be tokenized .the chat template places 0 images"),
        ("{{ messages }}", "cannot be tokenized .the chat template rewrites the text"),
        (r"{{ '\udc99' }}", "cannot be tokenized .the chat template prints text that is not valid Unicode"),
        (b"\xff", "chat_template.jinja cannot be read: "),
    ],
)
def test_a_template_that_does_not_work_is_refused_at_the_start(template, message, tiny, bundle_of):
    bundle = bundle_of(tiny)
    bundle.file(CHAT_TEMPLATE).write_bytes(template if isinstance(template, bytes) else template.encode())
    with pytest.raises(BundleError, match=message):
        RowLayout(bundle)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "odd", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}, {"content": " <|odd|>"}]
)
def test_an_added_token_that_depends_on_the_text_beside_it_is_refused(odd, special, tiny, bundle_of):
    tokenizer = Tokenizer.from_str(tiny.backend_tokenizer.to_str())
    token = AddedToken(**{"content": "<|odd|>", "normalized": False} | odd, special=special)
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    bundle = bundle_of(tiny)
    bundle.file(TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    if "normalized" in odd and not special:  # the tokenizer looks for it in each stretch by itself
        assert tokenizer.token_to_id("<|odd|>") in _asked(RowLayout(bundle), "a <|odd|>")
        return
    with pytest.raises(BundleError, match=r"added token ' ?<\|odd\|>' depends on the text beside it"):
        RowLayout(bundle)


def test_an_image_token_that_is_not_special_is_refused(tiny, bundle_of):
    with pytest.raises(BundleError, match="the image token 5 is no special token"):
        RowLayout(bundle_of(tiny, image_token_id=5))


def test_a_tokenizer_that_treats_the_start_of_text_otherwise_is_refused(tiny, bundle_of):
    settings = json.loads(tiny.backend_tokenizer.to_str())
    settings["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False}
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(settings)))
    template = "<|im_start|>{% for part in messages[0].content %}{{ part.text or '<|image_pad|><|vision_end|>' }}"
    bundle = bundle_of(tokenizer, template + "{% endfor %}<|im_end|>")
    contract = bundle.manifest.layout
    # As by the contract if the text is tokenized by itself, but not in its place.
    assert tokenizer.encode("x") == tiny.encode(" x")
    ids = tokenizer.encode("<|im_start|><|image_pad|><|vision_end|>x<|im_end|>")
    assert ids == contract.row_ids(tiny.encode("x"), 1)
    with pytest.raises(BundleError, match="do not reproduce"):
        RowLayout(bundle)


@pytest.mark.parametrize("contents", ["{}", ""])
def test_a_tokenizer_that_cannot_be_loaded_is_refused(contents, tiny, bundle_of):
    bundle = bundle_of(tiny)
    bundle.file(TOKENIZER).write_text(contents)
    with pytest.raises(BundleError, match=f"{TOKENIZER} cannot be loaded"):
        RowLayout(bundle)


def test_a_tokenizer_that_was_saved_to_truncate_or_pad_does_neither(tiny, bundle_of):
    bundle = bundle_of(tiny)
    expected = _asked(RowLayout(bundle), "Is the star above the square?")
    tokenizer = Tokenizer.from_str(tiny.backend_tokenizer.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    bundle.file(TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    assert _asked(RowLayout(bundle), "Is the star above the square?") == expected


def test_many_threads_may_share_a_layout(tiny, bundle_of):
    layout = RowLayout(bundle_of(tiny, resolution=NATIVE, max_seq_len=100_000))
    chance = random.Random(5)  # noqa: S311  (no secret)
    conversations = [made_up(chance) for _ in range(300)]
    conversations += [single_turn(f"Is the star number {number} above the square?", 1) for number in range(300)]
    grids = [SQUARE] * 4
    expected = [layout.row(conversation, grids) for conversation in conversations]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda conversation: layout.row(conversation, grids), conversations)) == expected
        texts = list(pool.map(layout.text, [row.input_ids for row in expected]))
    assert all(f"Is the star number {number} above the square?" in text for number, text in enumerate(texts[300:]))


def test_tokens_as_text(layout, tiny):
    image = layout.layout.image_token_id
    assert layout.text([image, *tiny.encode("A star."), image]) == "A star."
    assert layout.token_text(image) == IMAGE
    assert layout.token_text(tiny.encode(" the")[0]) == " the"
    assert layout.token_text(None) is None
