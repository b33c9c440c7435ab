"""Templates of base models: one text for each role."""

import pytest

from ctpd.core.errors import UserError
from ctpd.text.pairs import Message
from ctpd.text.render import PlainTemplate, TemplatedTokenizer
from tests.fixtures.tokenizers import tokenizer


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"user": "x", "assistant": "{content}"}, "role 'user': the text 'x' contains {content} 0 times"),
        ({"user": "{content}", "assistant": "{content}{content}"}, "role 'assistant': .* 2 times"),
        ({"user": "{content}", "assistant": "{content}", "system": ""}, "role 'system'"),
        ({"user": 3, "assistant": "{content}"}, "role 'user': the text is not a string"),
    ],
)
def test_each_text_of_a_plain_template_needs_content_exactly_once(texts: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PlainTemplate(**texts)


def test_a_system_message_needs_a_text_in_the_plain_template() -> None:
    side = TemplatedTokenizer(
        tokenizer("byte_bpe"), PlainTemplate(user="{content}\n", assistant="{content}"), "student"
    )
    with pytest.raises(UserError, match="row 0: the prompt has a system message"):
        side.frames([(Message("system", "s"), Message("user", "x"))], where=["row 0"])
