"""Chat templates give the text that transformers gives, and one that would take all time or memory is stopped."""

import itertools
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from btp_export.preprocess import template
from graphs.records import refusing

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONTENTS = (
    "what is it?",
    [{"type": "image"}, {"type": "text", "text": " what \n is it? "}],
    [{"type": "text", "text": "日本"}, {"type": "image"}, {"type": "text", "text": "don't"}],
)
TEMPLATES = {
    "vicuna": "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{# the picture first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "qwen": "{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and "
    "message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>"
    "{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: "
    "{% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system_message = '<<SYS>>\n' + "
    "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{{ '[INST] ' + message['content'] | string | trim + ' [/INST]' }}{% endfor %}{{ eos_token }}",
    "everything": "  {%- macro show(value) %}\n    {{- value | tojson(indent=2) }}\n  {%- endmacro %}\n"
    "{% for message in messages %}\n    {% if loop.index > 3 %}{% break %}{% endif %}\n"
    "    {{ show(message) }}{{ '%5.2f' % 3.14159 }}{{ '-' * 12 }}{{ 'a,b'.split(',') | join(';') }}\n"
    "    {%- generation %}{{ message.role | upper | center(12) }}{% endgeneration %}\n"
    "    {{ 'x<&>' | e }}{{ 'two\nlines' | indent(4) }}{{ dict(a=1).items() | list }}{{ 2 ** 10 }}{{ 7 % 3 }}\n"
    "    {{ message.content | length }}{{ 'a b'.replace(' ', '_').ljust(6) ~ '|' ~ loop.last }}\n"
    "{% endfor %}{% set ns = namespace(found=false) %}{% set ns.found = true %}{{ ns.found }}{{ tools is none }}",
}


def both(source: str, messages: list[dict[str, Any]]) -> tuple[str | None, str | None]:
    """Ours and transformers' text; None where it is refused."""
    texts: list[str | None] = []
    for run in (
        lambda: template.render(source, messages, SPECIAL),
        lambda: render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **SPECIAL)[0][0],
    ):
        try:
            texts.append(run())
        except (TemplateError, TypeError):
            texts.append(None)
    return texts[0], texts[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    texts = []
    for content, system in itertools.product(CONTENTS, [None, "Be brief.", [{"type": "text", "text": "Be brief."}]]):
        messages = [] if system is None else [{"role": "system", "content": system}]
        ours, theirs = both(TEMPLATES[name], [*messages, {"role": "user", "content": content}])
        assert ours == theirs
        texts.append(ours)
    assert any(texts)


HOSTILE = {
    "loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "text": "{{ 'a' * 20000000000 }}",
    "in a list": "{{ ([1] * 20000000000) | length }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width of a filter": "{{ '%1000000000d' | format(1) }}",
    "width of a method": "{{ '{:>1000000000}'.format(1) }}",
    "width as a value": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "width of a mapping": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "width in a filter": "{{ ('{:>1000000000}' | attr('format'))(1) }}",
    "centre": "{{ 'a' | center(1000000000) }}",
    "method": "{{ 'a'.ljust(1000000000) }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set ns = namespace(s='ab') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "joining": "{% set ns = namespace(s='ab') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "replacing": "{% set s = 'a' * 900000 %}{{ s.replace('a', s) }}",
    "filter": "{% set s = 'a' * 900000 %}{{ s | replace('a', s) }}",
    "list": "{% set s = 'a' * 900000 %}{{ (s | list) | join(s) }}",
    "indenting": "{{ ('\n' * 900000) | indent(9000) }}",
    "tabs": "{{ ('\t' * 900000).expandtabs(9000) }}",
    "width of a date": "{{ strftime_now('%1000000000Y') }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "output": "{% for a in range(90000) %}{{ 'a' * 900 }}{% endfor %}",
    "keeping texts": "{% set ns = namespace(l=[]) %}{% for i in range(90000) %}"
    "{% set ns.l = ns.l + ['a' * (900000 + i)] %}{% endfor %}",
    "keeping slices": "{% set ns = namespace(l=[]) %}{% set s = 'a' * 900000 %}{% for i in range(90000) %}"
    "{% set ns.l = (ns.l, s[1:]) %}{% endfor %}",
    "a filter's texts": "{{ (range(90000) | map('string') | map('center', 9000) | list) | length }}",
    "escape": "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.3)
    start, before = time.thread_time(), sys.gettrace()
    with pytest.raises(TemplateError) as error:
        template.render(HOSTILE[name], [{"role": "user", "content": "?"}], SPECIAL)
    assert time.thread_time() - start < 5
    assert name.startswith("width") == ("wider than any text" in str(error.value)), "refused before it is made"
    assert sys.gettrace() is before


@pytest.mark.skipif(refusing.anonymous_memory() is None, reason="this system does not tell the memory of a process")
@pytest.mark.parametrize("name", ["keeping texts", "keeping slices"])
def test_memory_that_a_template_keeps_is_bounded(name: str) -> None:
    script = (
        "import resource, sys\nfrom jinja2 import TemplateError\nfrom btp_export.preprocess import template\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    template.render(sys.argv[1], [], {})\n"
        "except TemplateError as error:\n    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, HOSTILE[name]], capture_output=True, text=True, check=True)
    message, grown = run.stdout.splitlines()
    assert "256 MB of memory" in message
    assert int(grown) < 2 * template.GROWTH


def test_limits_hold_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.2)
    caught: list[BaseException] = []

    def run() -> None:
        try:
            template.render(HOSTILE["loops"], [{"role": "user", "content": "?"}], SPECIAL)
        except TemplateError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and "seconds" in str(caught[0])
