"""Build the tiny checkpoint's tokenizer: Qwen2's pipeline, special tokens and chat template
around a small byte-level vocabulary learned from the scenes' own questions and answers.

    python datasets/build_tokenizer.py OUTPUT_DIR

`make_model.py` builds one as large as Qwen's, whose vocabulary is learned from made-up words.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scenes import questions, sample_scene
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

MERGED_VOCAB = 490
#: Tokens of Qwen2.5's vocabulary, without those that are added; and so many made-up words that no fewer are learned.
QWEN_VOCAB, MADE_UP_WORDS = 151_643, 180_000
#: What made-up words are made of.
STARTS = (*"bcdfghklmnprstvw", "", "br", "ch", "cl", "dr", "fl", "gr", "pl", "pr", "qu", "sh", "sp", "st", "str", "th")
VOWELS = (*"aeiou", "ai", "ea", "ee", "io", "ou")
ENDS = (*"lnrstmd", "", "", "ng", "nt", "rs", "st", "ck")
#: The more frequent ones first.
HAN, CYRILLIC = [[chr(at) for at in range(*span)] for span in ((0x4E00, 0x6570), (0x430, 0x450))]
MARKS = "\"{}[]:,.;()<>=+-*/\\'!?#$%&@|_~^`"
#: Qwen2.5's added tokens, in the order of their ids.
ADDED_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
#: From this index on they are not special: decoding that skips special tokens keeps them.
FIRST_ORDINARY = ADDED_TOKENS.index("<tool_call>")
#: Qwen2's pre-tokenization: how text is split before byte-pair encoding.
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(output: Path, corpus: Iterable[str], vocab_size: int) -> None:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt to `output`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    added = [AddedToken(text, special=i < FIRST_ORDINARY, normalized=False) for i, text in enumerate(ADDED_TOKENS)]
    tokenizer.add_tokens(added)

    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    tokenizer.model.save(str(output))
    config = _tokenizer_config(tokenizer, added)
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def scene_texts() -> Iterator[str]:
    """Questions about scenes, and their answers."""
    yield from ["system\n", "user\n", "assistant\n", "You are a helpful assistant."] * 1000
    rng = np.random.default_rng(0)
    for index in range(2000):
        for pairs in questions(sample_scene(rng, grey=index % 5 == 0)).values():
            for pair in pairs:
                yield from pair


def made_up_words() -> Iterator[str]:
    """Words of many scripts, capitals, and marks as in code and JSON, the first of them most often."""
    rng = np.random.default_rng(0)
    for number in range(MADE_UP_WORDS):
        yield from [_made_up_word(rng)] * (1 + 20_000 // (number + 1))


def _made_up_word(rng: np.random.Generator) -> str:
    def some(parts: Sequence[str], most: int) -> str:
        """Up to `most` of them, the first ones more often."""
        return "".join(parts[int(len(parts) * rng.random() ** 1.5)] for _ in range(1 + rng.integers(most)))

    blank, kind = " " if rng.random() < 0.7 else "", rng.random()
    if kind < 0.75:
        word = "".join(some(part, 1) for _ in range(1 + rng.integers(4)) for part in (STARTS, VOWELS, ENDS))
        return blank + (word.capitalize() if kind < 0.15 else word)
    if kind < 0.87:
        return some(HAN, 3)
    return blank + (some(CYRILLIC, 7) if kind < 0.92 else some(MARKS, 5))


def _tokenizer_config(tokenizer: Tokenizer, added: list[AddedToken]) -> dict[str, object]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token.content)): {
                "content": token.content, "lstrip": False, "normalized": False,
                "rstrip": False, "single_word": False, "special": token.special,
            }
            for token in added
        },
        "additional_special_tokens": list(ADDED_TOKENS[1:FIRST_ORDINARY]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    build_tokenizer(parser.parse_args().output, scene_texts(), MERGED_VOCAB)
