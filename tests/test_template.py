"""Templates print what they print in transformers, the conversation's text is found in it, and none breaks out."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import TINY
from conversations import as_messages, made_up
from transformers import AutoTokenizer

from qvl_batch.conversation import Message, single_turn
from qvl_batch.decoder.template import ERROR_LENGTH, ChatTemplate
from qvl_batch.errors import BundleError, PromptError

TEMPLATES = {
    "trims": """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content | trim }}{% else %}{% for part in message.content %}
{{ part.text | trim if part.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %}{% endif %}
<|im_end|>
{% endfor %}""",
    "looks at the ends": """
{%- for message in messages %}
    {%- set parts = [{'text': message.content}] if message.content is string else message.content %}
    {%- for part in parts if 'text' in part %}
        {%- if part.text and part.text[0] == ' ' %}{{ '_' + part.text.lstrip() }}{% else %}{{ part.text }}{% endif %}
        {%- if part.text.endswith('\n') %}{{ 'END' }}{% endif %}
        {{- part.text.rstrip('\n') }}{{ part.text.strip() == '' }}
    {%- endfor %}
{%- endfor %}""",
    "numbers images": """{% set count = namespace(images=0) %}{% for message in messages %}
{%- if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' %}{% set count.images = count.images + 1 %}Picture {{ count.images }}: <|image_pad|>
{%- else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}""",
    "texts before images": """{% for message in messages if message.content is not string %}
{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}
{% for part in message.content | rejectattr('type', 'equalto', 'text') %}<|image_pad|>{% endfor %}
{% endfor %}""",
    "first and last": """{% for message in messages %}{{ 'FIRST ' if loop.first else loop.index0 }}{{ message.role }}
{% if loop.last and message.role == 'user' %}ASKED{% endif %}
{% if message.content is string %}{{ message['content'] }}{% endif %}{% endfor %}""",
    "special tokens and the date": """{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% for message in messages %}
{{ message.content if message.content is string else message.content | map(attribute='text') | select('defined')
   | join('|') }}{{ eos_token }}{{ unk_token }}{% endfor %}""",
    "extensions": """{% for message in messages %}{% if loop.index > 3 %}{% break %}{% endif %}
{% if message.role == 'system' %}{% continue %}{% endif %}
    {% generation %}{% set scoped = message.role %}{{ scoped }}{% endgeneration %}{{ scoped }}
{{ message.role | tojson }} {{ {'<a>': "é'", 'b': [1, none, true]} | tojson(indent=1) }}
{{ dict.keys is defined }}
{{ dict(a=1).a }} {{ dict.fromkeys(['k'], 2)['k'] }} {{ namespace(self=3).self }} {{ tools is none }} {{ documents }}
{% if add_generation_prompt %}{{ range(3) | list }}{% endif %}
{% endfor %}
""",
    "macros": """{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}
{% if 'text' in part %}[{{ part.text }}]{% else %}{{ part }}{% endif %}{% endfor %}{% endif %}{% endmacro %}
{% for message in messages %}{{ message.role ~ ': ' ~ show(message.content) }}
{% endfor %}{{- 'again: ' + show(messages[-1].content) -}}""",
    "fills in": "{% for message in messages %}{{ '%s says: %s' | format(message.role, message.content) }}{% endfor %}",
}
VARIABLES = {"bos_token": "<s>", "eos_token": "<|im_end|>"}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.bos_token = VARIABLES["bos_token"]
    return tokenizer


def _by_transformers(tokenizer, conversation, template=None):
    return tokenizer.apply_chat_template(
        as_messages(conversation), chat_template=template, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("name", [None, *TEMPLATES])
def test_it_prints_what_transformers_prints(name, tokenizer):
    text = tokenizer.chat_template if name is None else TEMPLATES[name]
    template = ChatTemplate(text, tokenizer.special_tokens_map)
    chance = random.Random(name)  # noqa: S311  (no secret)
    for _ in range(150):
        conversation = made_up(chance)
        if name == "fills in":  # prints lists of parts as Python writes them, and with them escapes of text
            conversation = tuple(Message(message.role, message.text) for message in conversation)
        rendered = template.render(conversation)
        printed = rendered.fill(rendered.parts)
        assert printed == _by_transformers(tokenizer, conversation, text)
        texts = [part for message in conversation for part in message.parts if isinstance(part, str)]
        assert list(rendered.pieces) == [text.strip() for text in texts if text.strip()]


def test_text_of_the_conversation_is_told_from_the_template_s():
    template = ChatTemplate("{% for m in messages %}A{{ m.content }}B{{ m.content | trim }}{% endfor %}", {})
    rendered = template.render((Message("user", " \tx A B\n"), Message("assistant", "\n\n"), Message("user", "A")))
    assert rendered.parts == ("A \t", 0, "\nB", 0, "A\n\nBA", 1, "B", 1)
    assert rendered.pieces == ("x A B", "A")


def test_a_thousand_texts_are_told_apart():
    template = ChatTemplate("{% for part in messages[0].content %}{{ part.text }},{% endfor %}", {})
    rendered = template.render((Message("user", tuple(str(number) for number in range(1000))),))
    assert rendered.parts[::2] == tuple(range(1000))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content | upper }}", "lower"),
        ("{{ messages[0].content | length }}", "four"),
        ("{{ messages[0].content[:3] }}", "four"),
        ("{{ messages[0].content[1:] }}", "four"),
        ("{{ messages[0].content | list | join }}{{ messages[0].content[0] }}", "four"),
        ("{{ messages[0].content.split('</think>')[-1] }}", "hidden</think>shown"),
        ("{{ messages[0].content | tojson }}", 'a "quotation"'),
        ("{{ messages[0].content | urlencode }}", "a b"),
        ("{{ 'yes' if 'x' in messages[0].content else 'no' }}", "x"),
        (r"{{ messages[0].content }}{{ '\ud800\udc00\ud801' }}", "x"),
        (r"{{ '\ud800\udc00\ud801' }}", "x"),
        (r"{{ '\ud800' + messages[0].content }}", "x"),
    ],
)
def test_a_template_that_rewrites_text_is_refused_for_that_row(template, text):
    with pytest.raises(PromptError, match=r"^the chat template rewrites the text of this conversation"):
        ChatTemplate(template, {}).render((Message("user", text),))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.split('</think>')[-1] }}",
        "{{ messages[0].content | tojson }}",
        "{{ 'yes' if 'x' in messages[0].content else 'no' }}",
        "{{ messages[0].content.replace('<image>', '') }}",
    ],
)
def test_a_template_that_could_rewrite_text_may_where_it_does_not(template, tokenizer):
    conversation = (Message("user", " shown\n"),) if "tojson" not in template else (Message("user", "shown"),)
    rendered = ChatTemplate(template, {}).render(conversation)
    assert rendered.fill(rendered.parts) == _by_transformers(tokenizer, conversation, template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('System role not supported.\nSee there.') }}",
            r"^the chat template refuses the conversation: System role not supported\.$",
        ),
        ("{{ raise_exception(messages[0].content) }}", "^the chat template refuses the conversation: What is it?"),
        (r"{{ raise_exception('\ud800') }}", r"^the chat template refuses the conversation: \?$"),
        ("{{ raise_exception('') }}", "^the chat template refuses the conversation: _RefusalError$"),
        ("{{ 1 / 0 }}", "^the chat template fails: ZeroDivisionError: division by zero$"),
        ("{{ messages[0].content + 1 }}", "^the chat template fails: TypeError: "),
        ("{{ nothing.at_all }}", "^the chat template fails: UndefinedError: 'nothing' is undefined$"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "^the chat template fails: RecursionError: "),
        ("{{ range(1000000) }}", "^the chat template fails: OverflowError: "),
    ],
)
def test_an_error_of_the_template_fails_the_row_and_is_one_valid_line(template, message):
    with pytest.raises(PromptError, match=message) as raised:
        ChatTemplate(template, {}).render((Message("user", "What is it?" * 99),))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value).encode()) < ERROR_LENGTH + 60


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages", "{% unknown %}", "{% for m in messages %}"])
def test_a_template_that_cannot_be_compiled_is_refused(template):
    with pytest.raises(BundleError, match=r"^the chat template cannot be compiled: "):
        ChatTemplate(template, {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ strftime_now.__self__.year }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ namespace.__init__.__globals__['json'] }}",
        "{{ namespace.mro()[0] }}",
        "{{ dict.fromkeys.__func__.__globals__ }}",
        "{{ dict.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ (messages|map(attribute='__class__')|first).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{m.__class__.__mro__}'.format_map({'m': messages}) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace({'_x': 1}) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
    ],
)
def test_no_template_leaves_the_sandbox(template):
    with pytest.raises(PromptError, match=r"^the chat template fails: "):
        ChatTemplate(template, {}).render(single_turn("x", 1))


def test_many_threads_may_share_a_template(tokenizer):
    template = ChatTemplate(tokenizer.chat_template, {})
    chance = random.Random(3)  # noqa: S311  (no secret)
    conversations = [made_up(chance) for _ in range(300)]
    expected = [template.render(conversation) for conversation in conversations]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(template.render, conversations)) == expected
