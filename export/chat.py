"""The layout contract's tokens, from a checkpoint's own chat template.

What enters: a `transformers` tokenizer. What leaves: the token ids before the image, between image
and prompt, and after the prompt.
"""

from typing import Any

from qvl_batch.errors import ExportError

#: Placeholder for the prompt while the rendered template is split.
_PROMPT_MARK = "qvl-batch-prompt-mark"


def chat_turn(tokenizer: Any, image_token_id: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Token ids before the image, between image and prompt, and after the prompt.

    The tokenizer's own chat template is applied to one user turn, image first. The prompt is tokenized
    separately. That is exact because there is a special token on each side of it, which is checked here.

    Args:
        tokenizer: a `transformers` tokenizer with a chat template.
        image_token_id: the id that stands for one merged patch of the image.

    Raises:
        ExportError: the template cannot be split that way.
    """
    content = [{"type": "image"}, {"type": "text", "text": _PROMPT_MARK}]
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program and can raise anything
        first_line = str(error).strip().split("\n")[0]
        raise ExportError(
            f"the chat template fails on a turn of an image and text: {type(error).__name__}: {first_line}"
        ) from error
    image_token = tokenizer.convert_ids_to_tokens(image_token_id)
    if text.count(image_token) != 1 or text.count(_PROMPT_MARK) != 1:
        raise ExportError(
            f"the chat template must produce one {image_token} and then the prompt once; it produced the first "
            f"{text.count(image_token)} times and the second {text.count(_PROMPT_MARK)} times"
        )
    head, _, rest = text.partition(image_token)
    bridge, mark, tail = rest.partition(_PROMPT_MARK)
    ids = [tuple(tokenizer(part, add_special_tokens=False).input_ids) for part in (head, bridge, tail)]
    added = set(tokenizer.added_tokens_decoder)
    if not mark or not ids[1] or not ids[2] or not {ids[1][-1], ids[2][0]} <= added:
        raise ExportError("the chat template must put a special token on each side of the prompt")
    return ids[0], ids[1], ids[2]
