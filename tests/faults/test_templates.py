"""Chat templates that never end, eat memory or fail in any other way than Jinja's: one sentence that names template and row."""

import copy
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ctpd.core.errors import UserError
from ctpd.text import limited
from ctpd.text.pairs import Message
from ctpd.text.render import ChatTemplate, TemplatedTokenizer
from harness.evaluate import Documents, evaluate_column
from tests.fixtures.colours import choice as choice
from tests.fixtures.colours import data_root as data_root
from tests.fixtures.tiny import tiny_model
from tests.fixtures.tokenizers import tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loops": (ENDLESS, "takes more than 1 seconds of processor time"),
    "one long operation": (
        "{% set x = (messages | length + 6) ** (9 ** 9) %}",
        "takes more than 1 seconds of processor time",
    ),
    "memory": ("{% set x = 'x' * 9000000000 %}{{ x | length }}", "needs more than 2 GiB of memory"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on the conversation"),
    "division": ("{{ 1 / 0 }}", "fails on the conversation"),
    "Python": ("{{ ''.__class__.__mro__ }}", "fails on the conversation"),
}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "SECONDS", 1)


def with_template(text: str | dict[str, str]) -> Any:
    own = copy.deepcopy(tokenizer("byte_bpe"))
    own.chat_template = text
    return own


def side(text: str) -> TemplatedTokenizer:
    own = with_template(text)
    return TemplatedTokenizer(own, ChatTemplate(own, {}), name="student")


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("row", [0, 2])
def test_a_hostile_template_is_refused_with_the_row(name: str, row: int) -> None:
    """Also where it is hostile to one row alone; texts of several rows are rendered in one go."""
    text, reason = HOSTILE[name]
    when = "{% if 'now' in messages[0].content %}" + text + "{% endif %}"
    prompts = [[Message("user", "now" if i == row else "later")] for i in range(4)]
    start = time.perf_counter()
    with pytest.raises(UserError, match=rf"^row {row}: the chat template of 'byte_bpe' .*{reason}"):
        side(when + CHATML).frames(prompts, where=[f"row {i}" for i in range(4)])
    assert time.perf_counter() - start < 30


def test_what_a_response_sets_off_is_found_too() -> None:
    text = "{% if 'now' in messages[-1].content %}" + ENDLESS + "{% endif %}" + CHATML
    reads = side(text)
    rows = [([Message("user", "Why?")], "later"), ([Message("user", "Why?")], "now")]
    where = ["row 0", "row 1"]
    frames = reads.frames([prompt for prompt, _ in rows], where=where)
    with pytest.raises(UserError, match=r"^row 1: .* takes more than 1 seconds"):
        reads.encode(rows, frames=frames, where=where)


def test_texts_come_back_as_they_were_rendered() -> None:
    """With line breaks, other scripts, nothing at all and half a surrogate pair."""
    texts = ["a\nb", "Привет 🙂", "", "\ud83d", "x" * 100_000]
    assert limited.limited(len(texts), lambda row: (texts[row], "", texts[-row])) == [
        [text, "", texts[-row]] for row, text in enumerate(texts)
    ]
    assert limited.limited(0, lambda row: ()) == []


def test_errors_come_back_with_their_parts_and_no_process_stays() -> None:
    def refuse(row: int) -> tuple[str, ...]:
        raise UserError("it is wrong", where=f"row {row}", fix="Correct it")

    with pytest.raises(UserError) as found:
        limited.limited(2, refuse)
    assert (found.value.what, found.value.where, found.value.fix) == ("it is wrong", "row 0", "Correct it")
    with pytest.raises(RuntimeError, match="KeyError"):
        limited.limited(1, lambda row: {}["missing"])  # type: ignore[misc]
    with pytest.raises(limited.LimitReached, match="ends the process with SIGKILL"):
        limited.limited(1, lambda row: os.kill(os.getpid(), 9))  # type: ignore[arg-type, func-returns-value]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("when", ["true", "'item' in messages[-1].content"], ids=["always", "for one document"])
def test_an_evaluation_with_a_template_that_never_ends_is_refused(when: str, choice: Any, data_root: Path) -> None:
    hostile = with_template("{% if " + when + " %}" + ENDLESS + "{% endif %}" + CHATML)
    model = tiny_model("llama", scorer=False)
    with pytest.raises(UserError, match=r"chat template takes more than 1 seconds.*`chat_template: false`"):
        evaluate_column(model, hostile, choice, Documents(data_root, limit=1, chat_template=True), batch_size=2)


def test_an_evaluation_with_a_template_that_loses_the_question_is_refused(choice: Any, data_root: Path) -> None:
    """Or with several templates, none of which is the default, or one that fails in another way than Jinja's."""
    documents = Documents(data_root, limit=1, chat_template=True)
    refused = {
        "the capital": "without the text of the user's message",
        "": "has no chat template",
        "{% if %}": "is none of Jinja's",
        "{{ 1 / 0 }}": r"fails on a document \(division by zero\)",
    }
    for text, said in refused.items():
        own = with_template(text) if text else with_template({"tool_use": CHATML})
        with pytest.raises(UserError, match=rf"{said}.*`chat_template: false`"):
            evaluate_column(tiny_model("llama", scorer=False), own, choice, documents, batch_size=2)
