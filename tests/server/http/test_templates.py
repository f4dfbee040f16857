"""A template is text with places for the input, and nothing in it is interpreted."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyhead.server.http.schemas import INPUT
from polyhead.server.http.templates import filled, filled_length

PIECES = st.sampled_from(
    [
        *(
            INPUT,
            "{",
            "}",
            "{}",
            "{{",
            "{{input}}",
            "{0}",
            "{input.__class__}",
            "{input!r}",
            "{:>9}",
        ),
        *(
            "%s",
            "%(input)s",
            "$input",
            "${input}",
            "{{ 7*7 }}",
            "{% include 'x' %}",
            "\\1",
            "\\g<0>",
        ),
        *("é", "\n", "\0", "{in", "put}", "<|im_start|>"),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=8).map("".join)


@given(TEXTS, TEXTS)
def test_only_the_input_is_put_in(template: str, text: str) -> None:
    parts = re.split(re.escape(INPUT), template)  # an independent way to the same text
    assert filled(template, text) == text.join(parts)


@given(TEXTS, TEXTS)
def test_the_length_is_known_before_it_is_built(template: str, text: str) -> None:
    assert filled_length(template, text) == len(filled(template, text))


@pytest.mark.parametrize(
    "template",
    [
        "{input} {{ 7*7 }} {{ ''.__class__.__mro__ }}",
        "{input} {0.__class__} {input.__init__.__globals__} {input!r}",
        "{input} %(input)s $input ${HOME} `id` $(id)",
        "{input} {% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_the_languages_of_other_templates_are_plain_text(template: str) -> None:
    assert filled(template, "x") == "x" + template[len(INPUT) :]


def test_a_place_in_the_input_is_not_filled_again() -> None:
    assert filled("a {input} b", "{input}{input}") == "a {input}{input} b"
