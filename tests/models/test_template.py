"""Chat templates that never end or fill the memory are refused at loading."""

import pytest

from redraft.models import template
from redraft.models.template import check_template

LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' and loop.index0 % 2 == 0 %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "hostile",
    [
        "{% for a in range(9999) %}" * 4 + "{% endfor %}" * 4,
        "{% generation %}{{ 9**(9**9) }}{% endgeneration %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 'a'|center(9999999999) }}",
        "{{ '%09999999999d' % 1 }}",
        "{% set a = 'aaaaaaaa' %}" + "{% set a = a ~ a %}" * 40 + "{{ a }}",
    ],
)
def test_a_template_that_does_not_end_or_fills_the_memory_is_refused(monkeypatch, hostile):
    monkeypatch.setattr(template, "SECONDS", 1)
    monkeypatch.setattr(template, "MEGABYTES", 512)
    with pytest.raises(ValueError, match=r"^here: rendering a chat .* takes more than 1 s or 512 MB"):
        check_template("here", {"default": CHATML, "tools": hostile})


def test_a_template_by_itself_is_refused_too():
    with pytest.raises(ValueError, match="takes more than 2 s or 1024 MB"):
        check_template("here", "{{ 'a' * 10000000000 }}")


@pytest.mark.parametrize(
    "given",
    [
        None,
        LLAMA_2,
        "{% macro shout(x) %}{{ x|upper }}{% endmacro %}{% for m in messages %}{{ shout(m['content']) }}{% endfor %}",
        "{% for i in range(messages|length) %}{{ messages[i]['content'] }}{% endfor %}",
        "{{ raise_exception('roles must alternate') }}{{ 2 * 2 }}",
        "{% for %} * ",
        "{{ tools * unknown.thing }}",
    ],
)
def test_a_template_that_ends_is_taken_whatever_it_says(given):
    check_template("here", given)
