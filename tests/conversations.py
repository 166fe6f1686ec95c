"""Made-up conversations, with text that is hard to tokenize."""

import random
from typing import Any

from qvl_batch.conversation import Conversation, Message, Part

SPECIAL = ("<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>")
#: Added tokens of the tiny checkpoint that are not special, which are found in text too.
ADDED = ("<tool_call>", "</tool_call>", "<|fim_prefix|>")
WORDS = (
    *(
        "How",
        " many",
        " squares",
        "?",
        " are",
        "Is",
        " the",
        "image",
        "user",
        "assistant",
        "system",
        "'s",
        "12345",
        "7",
    ),
    *(
        "\n",
        "\n\n",
        " \n",
        "\r\n",
        "\r",
        "\t",
        " ",
        "   ",
        "\x0b",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2003",
        "\u2028",
        "\u3000",
    ),
    *("\u200b", "\u200d", "\u200e", "\ufeff", "\u00ad", "\0", "\x1b[31m", "\ufffd", "\uffff", "\U0010ffff"),
    *(
        "é",
        "e\u0301",
        "\u0301",
        "\u0301\u0323",
        "Å",
        "\u212b",
        "A\u030a",
        "\u1fbe\u0308\u0301",
        "ﬁ",
        "\u1112\u1161\u11ab",
    ),
    *("한", "你好", "\uff0c", "日本語", "ไทย", "हिन्दी", "مرحبا", "שלום", "\u202eback", "\u2067x\u2069"),
    *("🎉", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "❤\ufe0f", "1\ufe0f\u20e3", "\U0001d4b3", "\U000e0041"),
    *(
        "<|im_",
        "end|>",
        "<|",
        "|>",
        "<",
        "<|im_end",
        "im_end|>",
        "{{ x }}",
        "{% if %}",
        "\\n",
        "Picture 1: ",
        '"',
        "</s>",
    ),
)


def made_up_text(chance: random.Random, special: bool) -> str:
    """Some text: often short, seldom long, sometimes blank or empty."""
    words = (*WORDS, *ADDED, *SPECIAL) if special else (*WORDS, *ADDED)
    count = chance.choice([0, 1, 1, 2, 3, 3, 5, 8, 13, 13, 13, 150 if chance.random() < 0.1 else 21])
    return "".join(chance.choices(words, k=count))


def made_up(chance: random.Random, *, special: bool = True) -> Conversation:
    """A conversation of one to six turns and up to four images, with a system message or without.

    Args:
        chance: source of chance.
        special: whether text may spell special tokens.
    """
    turns = chance.randint(1, 6)
    images = chance.choice([0, 1, 1, 2, 3, 4])
    held: list[list[Part]] = [[] for _ in range(turns)]
    for number in range(images):
        held[chance.randrange((turns + 1) // 2) * 2].append(number)
    conversation: list[Message] = []
    if chance.random() < 0.4:
        text = made_up_text(chance, special)
        conversation.append(Message("system", text if chance.random() < 0.5 else (text,)))
    for turn, parts in enumerate(held):
        role = "assistant" if turn % 2 else "user"
        texts = [made_up_text(chance, special) for _ in range(chance.choice([1, 1, 1, 2, 3]))]
        if role == "user" and not "".join(texts).strip():
            texts.append("What is it?")
        if not parts and chance.random() < 0.5:
            conversation.append(Message(role, "".join(texts)))
            continue
        content = list(parts)
        for text in texts:
            content.insert(chance.randint(0, len(content)), text)
        conversation.append(Message(role, tuple(content)))
    # Images are numbered in the order of the table, which need not be that of the conversation.
    order = list(range(images))
    chance.shuffle(order)
    return tuple(
        Message(
            message.role,
            message.content
            if isinstance(message.content, str)
            else tuple(part if isinstance(part, str) else order[part] for part in message.content),
        )
        for message in conversation
    )


def as_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """As transformers takes it."""
    return [
        {
            "role": message.role,
            "content": message.content
            if isinstance(message.content, str)
            else [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.content
            ],
        }
        for message in conversation
    ]
