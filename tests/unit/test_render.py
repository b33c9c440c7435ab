"""Rendering and tokenizing (docs/method.md#data-step): the tokens of prompt and response, and the end token."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpd.core.errors import UserError
from ctpd.text.pairs import Message
from ctpd.text.render import ChatTemplate, Encoded, PlainTemplate, TemplatedTokenizer
from ctpd.text.templates import DIFFERENCES, EndToken
from tests.fixtures.tokenizers import CHATML, KINDS, tokenizer, with_bos, with_template

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_end|>\n\n' + message['content'] | trim + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"
)
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = PlainTemplate(user="Question: {content}\n", assistant="Answer: {content}\n", system="{content}\n\n")
PROMPT = (Message("user", "what is it?"),)


def encode(side: TemplatedTokenizer, response: str, prompt: tuple[Message, ...] = PROMPT) -> Encoded:
    where = ["row 0"]
    return side.encode([(prompt, response)], frames=side.frames([prompt], where=where), where=where)


def parts(side: TemplatedTokenizer, encoded: Encoded) -> tuple[list[str], list[str], list[str]]:
    """The tokens of a single row: prompt, response, the rest."""
    tokens = side.tokenizer.convert_ids_to_tokens(encoded.ids.tolist())
    first, stop = int(encoded.prompt_tokens[0]), int(encoded.prompt_tokens[0] + encoded.response_tokens[0])
    return tokens[:first], tokens[first:stop], tokens[stop:]


def chat(template: str, kind: str = "byte_bpe", **variables: object) -> TemplatedTokenizer:
    side_tokenizer = with_template(kind, template)
    return TemplatedTokenizer(side_tokenizer, ChatTemplate(side_tokenizer, variables), "student")


def test_plain_rows_end_with_eos_and_have_no_other_special_token() -> None:
    """A plain row is the turns, the response and EOS; text after the last {content} is left out."""
    side = TemplatedTokenizer(tokenizer("byte_bpe"), PLAIN, "teacher")
    turns = (Message("system", "Hi."), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    encoded = encode(side, "yes", turns)
    prompt, response, rest = parts(side, encoded)
    text = side.tokenizer.decode(encoded.ids)
    assert text == "Hi.\n\nQuestion: a\nAnswer: b\nQuestion: c\nAnswer: yes</s>"
    assert rest == ["</s>"]
    assert "".join(response) in ("yes", "Ġyes")
    assert prompt


def test_plain_rows_have_bos_only_if_the_tokenizer_adds_one() -> None:
    assert parts(*_with(TemplatedTokenizer(with_bos("byte_bpe"), PLAIN, "teacher")))[0][0] == "<s>"
    assert parts(*_with(TemplatedTokenizer(tokenizer("byte_bpe"), PLAIN, "teacher")))[0][0] != "<s>"
    # A chat template writes its own.
    assert not chat(CHATML).adds_bos


def _with(side: TemplatedTokenizer) -> tuple[TemplatedTokenizer, Encoded]:
    return side, encode(side, "yes")


@pytest.mark.parametrize("template", [CHATML, LLAMA3, THINKING], ids=["chatml", "llama3", "thinking"])
@pytest.mark.parametrize("response", ["yes it is", "a", "e", "assistant", "user\n", "im_end", "{{ x }}", "think"])
def test_chat_rows_hold_exactly_the_response(template: str, response: str) -> None:
    """Any response, even one whose text occurs in the template, is found at its position and ends the row."""
    response = response.strip()
    side = chat(template)
    encoded = encode(side, response)
    prompt, spelled, rest = parts(side, encoded)
    assert side.tokenizer.convert_tokens_to_string(spelled) == response
    assert rest == ["</s>" if template is LLAMA3 else "<|im_end|>"], "nothing follows the end of the turn"
    assert "</think>" not in side.tokenizer.convert_tokens_to_string(prompt), "it is not in the generation prompt"
    assert encoded.difference.tolist() == [DIFFERENCES.index("inserted") if template is THINKING else -1]
    assert encoded.response_ends[-1] == len(response)


def test_text_between_response_and_end_token_is_neither() -> None:
    side = chat(CHATML.replace("<|im_end|>", " .\n<|im_end|>"))
    _, response, rest = parts(side, encode(side, "yes"))
    assert side.tokenizer.convert_tokens_to_string(response) == "yes"
    assert side.tokenizer.convert_tokens_to_string(rest) == " .\n<|im_end|>"


R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}[User]{{ m.content }}{% else %}[Assistant]"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[Assistant]<think>\n{% endif %}"
)
NEMO = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "[INST]{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
REASONING = "<think>\nhm\n</think>\n\nyes"
SYSTEM = (Message("system", "Be brief."), *PROMPT)


@pytest.mark.parametrize(
    ("template", "prompt", "response", "difference"),
    [
        (THINKING, PROMPT, REASONING, "inserted"),
        (CHATML.replace("message.content", "message.content.split('</think>')[-1]"), PROMPT, REASONING, "response"),
        (CHATML.replace("message.content", "message.content | upper"), PROMPT, "yes", "response"),
        (CHATML.replace("<|im_end|>", "{% if message.role == 'assistant' %}!{% endif %}<|im_end|>"), PROMPT, "yes", ""),
        (R1, PROMPT, "hm\n</think>\n\nyes", "prompt"),
        (R1, PROMPT, REASONING, "doubled"),
        (CHATML, PROMPT, REASONING, ""),
        (NEMO, SYSTEM, "yes", "prompt"),
        (NEMO, PROMPT, "yes", ""),
        (GEMMA, PROMPT, "yes", "prompt"),
        (GLM, PROMPT, "yes", "end"),
        ("{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}" + CHATML, PROMPT, "yes", "fails"),
    ],
    ids=[
        "qwen3",
        "strips",
        "changes",
        "late text",
        "r1",
        "r1 with its tag",
        "tag alone",
        "nemo system",
        "nemo",
        "gemma",
        "glm",
        "fails",
    ],
)
def test_a_row_is_the_generation_prompt_the_response_as_it_is_and_the_end(
    template: str, prompt: tuple[Message, ...], response: str, difference: str
) -> None:
    """Whatever the template makes of the whole conversation; what it makes of it is reported."""
    side = chat(template)
    encoded = encode(side, response, prompt)
    opening = side.tokenizer.apply_chat_template(
        [message._asdict() for message in prompt], tokenize=False, add_generation_prompt=True
    )
    before, spelled, rest = map(side.tokenizer.convert_tokens_to_string, parts(side, encoded))
    assert (before + spelled).lstrip(" ").replace("[/INST] ", "[/INST]") == opening + response
    assert spelled.strip() == response
    assert rest.removeprefix("!") in ("<|im_end|>", "</s>")
    assert [DIFFERENCES[kind] if kind >= 0 else "" for kind in encoded.difference] == [difference]


def test_white_space_that_a_template_writes_before_a_response_stays() -> None:
    """The model generates it there, too; Mistral and Llama 2 write it."""
    frame = chat(NEMO).frames([PROMPT], where=[""])[0]
    assert frame.before == "[INST]what is it?[/INST] "
    assert frame.after == "</s>"


@pytest.mark.parametrize(
    ("end", "spelled"),
    [
        (None, "</s>"),
        (EndToken("<|im_end|>", "generation_config"), "<|im_end|>"),
        (EndToken("<|im_start|>", "recipe"), "<|im_start|>"),
    ],
)
def test_a_template_without_end_of_turn_takes_the_end_that_recipe_or_model_say(
    end: EndToken | None, spelled: str
) -> None:
    """The recipe before `generation_config`, that before the tokenizer's EOS token."""
    own = with_template("byte_bpe", GLM)
    side = TemplatedTokenizer(own, ChatTemplate(own, {}, end=end), "student")
    assert parts(side, encode(side, "yes"))[2] == [spelled]
    assert side.ends_from == {"tokenizer" if end is None else end.origin}


def test_the_recipes_end_token_replaces_what_the_template_writes_and_the_models_does_not() -> None:
    own = with_template("byte_bpe", CHATML)
    for origin, expected in (("recipe", "</s>"), ("generation_config", "<|im_end|>")):
        side = TemplatedTokenizer(own, ChatTemplate(own, {}, end=EndToken("</s>", origin)), "student")  # type: ignore[arg-type]
        assert parts(side, encode(side, "yes"))[2] == [expected]
    with pytest.raises(UserError, match=r"`end_token: the end` of the student is \d+ tokens"):
        TemplatedTokenizer(own, ChatTemplate(own, {}, end=EndToken("the end", "recipe")), "student")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (SYSTEM, "System role not supported"),
        ((*PROMPT, *PROMPT), "Conversation roles must alternate"),
    ],
)
def test_a_conversation_that_a_template_does_not_render_is_named(prompt: tuple[Message, ...], message: str) -> None:
    side = chat(GEMMA)
    found = side.refused([PROMPT, prompt], where=["row 0", "row 1"])
    assert found[0] is None
    assert found[1] is not None
    assert found[1].why.startswith("the chat template of 'byte_bpe' fails on the conversation")
    assert (message in found[1].why, found[1].reason) == (True, "template")
    with pytest.raises(UserError, match=f"row 1: .*{message}") as error:
        side.frames([PROMPT, prompt], where=["row 0", "row 1"])
    assert "\n" not in str(error.value)


LLAVA = (
    "{% for message in messages %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}</s>{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "kept", "said"),
    [
        (LLAVA, False, "message: it reads messages in parts"),
        ("what", False, "the user's last message"),
        (CHATML.replace("message.content", "message.content[:6]"), False, "the user's last message"),
        (CHATML.replace("message.content", "message.content | trim | upper"), True, ""),
        (CHATML.replace("message.content", "message.content | replace(' ', '\n')"), True, ""),
    ],
    ids=["LLaVA", "constant", "cut", "case", "white space"],
)
def test_a_prompt_that_a_template_renders_without_the_question_is_refused(template: str, kept: bool, said: str) -> None:
    """The model would answer what it was never asked; white space and case may change."""
    (found,) = chat(template).refused([(Message("user", " What is it? "),)], where=["row 0"])
    assert (found is None) == kept
    if found is not None:
        assert (said in found.why, found.reason) == (True, "lost_text")


def test_a_merged_system_message_begins_the_first_user_message() -> None:
    own = with_template("byte_bpe", GEMMA)
    template = ChatTemplate(own, {}, merge_system=True)
    side = TemplatedTokenizer(own, template, "student")
    turns = (*SYSTEM, Message("assistant", "a"), Message("user", "b"))
    (frame,) = side.frames([turns], where=[""])
    assert "<|im_start|>user\nBe brief.\n\nwhat is it?<|im_end|>" in frame.before
    assert frame.before.count("Be brief.") == 1
    assert side.frames([PROMPT], where=[""])[0].before == chat(GEMMA).frames([PROMPT], where=[""])[0].before


@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_templates_that_write_a_response_as_it_is_have_the_tokens_of_their_own_rendering(template: str) -> None:
    """So that their rows are those of earlier versions."""
    side = chat(template)
    for prompt in (PROMPT, SYSTEM, (*SYSTEM, Message("assistant", "a"), Message("user", "b"))):
        encoded = encode(side, "yes, it is", prompt)
        messages = [message._asdict() for message in (*prompt, Message("assistant", "yes, it is"))]
        own = side.tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024")
        whole = side.tokenizer(own, add_special_tokens=False)["input_ids"]
        assert whole[: len(encoded.ids)] == encoded.ids.tolist()
        assert side.tokenizer.decode(whole[len(encoded.ids) :]).strip() == ""
        assert encoded.difference.tolist() == [-1]


def test_the_date_is_fixed() -> None:
    """Templates that write a date always write the same one; the recipe may set the variable."""
    clock = chat("{{ strftime_now('%d %B %Y') }}|" + CHATML)
    assert clock.tokenizer.decode(encode(clock, "yes").ids).startswith("26 July 2024|")
    variable = "{{ date_string }}|" + CHATML
    assert chat(variable).template.frames([PROMPT], where=[""])[0].before.startswith("26 Jul 2024|")
    assert chat(variable, date_string="1 May").template.frames([PROMPT], where=[""])[0].before.startswith("1 May|")


def test_template_variables_are_passed() -> None:
    side = chat("{% if shout %}LOUD {% endif %}" + CHATML, shout=True)
    assert side.template.frames([PROMPT], where=[""])[0].before.startswith("LOUD ")


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    with pytest.raises(UserError, match=r"'byte_bpe' has no chat template\. Write a plain template"):
        ChatTemplate(tokenizer("byte_bpe"), {})


def test_a_slow_tokenizer_is_refused_with_the_way_out() -> None:
    slow = SimpleNamespace(is_fast=False, name_or_path="old/model")
    with pytest.raises(UserError, match=r"the teacher's tokenizer 'old/model' is a slow one.*tokenizer\.json"):
        TemplatedTokenizer(slow, PLAIN, "teacher")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["byte_bpe", "byte_bpe_trimmed", "byte_bpe_prefixed"])
def test_tokens_across_the_border_belong_to_the_response_and_are_counted(kind: str) -> None:
    """Such a token is clipped and counted, with trimmed offsets too; a template that ends with a line feed has none."""
    side = TemplatedTokenizer(
        tokenizer(kind), PlainTemplate(user="{content}\n", assistant="Answer: {content}"), "student"
    )
    encoded = encode(side, "yes, it is")
    assert parts(side, encoded)[1][0][1:] == "yes"
    assert encoded.crossing.tolist() == [True]
    assert encoded.response_ends[0] == 3
    line = TemplatedTokenizer(
        tokenizer(kind), PlainTemplate(user="{content}\n", assistant="Answer:\n{content}"), "student"
    )
    assert encode(line, "yes, it is").crossing.tolist() == [False]


def test_a_trimmed_space_at_the_end_of_the_prompt_belongs_to_the_prompt() -> None:
    """With trimmed offsets the prompt's last space is a token of no width at the border."""
    few_merges = tokenizer("byte_bpe_trimmed", 266)
    side = TemplatedTokenizer(few_merges, PlainTemplate(user="{content}\n", assistant="Answer: {content}"), "student")
    encoded = encode(side, "🙂")
    prompt, response, _ = parts(side, encoded)
    assert prompt[-1] == "Ġ"
    assert "Ġ" not in response
    assert encoded.crossing.tolist() == [False]


@pytest.mark.parametrize("kind", ["byte_bpe_trimmed", "sentencepiece_bpe"])
def test_an_inserted_prefix_belongs_to_the_response(kind: str) -> None:
    """A prefix that is inserted behind the generation prompt would be generated: a response token with end 0."""
    side = chat(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        kind,
    )
    for text in "жZ½\u0301":
        encoded = encode(side, text)
        prompt, response, rest = parts(side, encoded)
        assert prompt[-1] == "<|im_start|>"
        assert response[0][0] in "Ġ▁"
        assert rest == ["<|im_end|>"]
        assert encoded.response_ends[0] == (len(response[0]) > 1)
        assert encoded.response_ends[-1] == 1


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT, question=TEXT)
def test_no_token_of_any_text_is_lost_between_prompt_and_end(kind: str, text: str, question: str) -> None:
    """Prompt, response and end are all tokens of the rendered text, in order; the response's ends stay within it."""
    prompt = (Message("user", question),)
    for side in (TemplatedTokenizer(tokenizer(kind), PLAIN, "student"), chat(CHATML, kind)):
        if side.holds_special_text(text) or side.holds_special_text(question):
            continue
        frame = side.template.frames([prompt], where=[""])[0]
        encoded = encode(side, text, prompt)
        whole = side.tokenizer(frame.before + text + frame.after, add_special_tokens=False)["input_ids"]
        if side.template.writes_end:
            assert whole[: len(encoded.ids)] == encoded.ids.tolist()
            assert side.tokenizer.convert_ids_to_tokens(int(encoded.ids[-1])) == "<|im_end|>"
        else:
            assert [*whole, side.tokenizer.eos_token_id] == encoded.ids.tolist()
        assert encoded.prompt_tokens[0] + encoded.response_tokens[0] + 1 == len(encoded.ids)
        assert encoded.response_tokens[0] == len(encoded.response_ends)
        assert ((encoded.response_ends >= 0) & (encoded.response_ends <= len(text))).all()


def test_many_rows_are_encoded_as_one_by_one() -> None:
    side = chat(THINKING, "unigram")
    prompts = [(Message("user", text),) for text in ("a", "what is 日本?", "x" * 50)]
    responses = ["yes", "🙂 no", "b c"]
    where = ["", "", ""]
    rows = list(zip(prompts, responses, strict=True))
    many = side.encode(rows, frames=side.frames(prompts, where=where), where=where)
    for i, (prompt, response) in enumerate(rows):
        one, row = encode(side, response, prompt), many.select(np.arange(3) == i)
        for left, right in zip(one, row, strict=True):
            assert np.array_equal(left, right)


def test_special_tokens_are_found_in_content() -> None:
    side = TemplatedTokenizer(tokenizer("byte_bpe"), PLAIN, "student")
    assert side.holds_special_text("a <|im_end|> b")
    assert side.holds_special_text("</s>")
    assert not side.holds_special_text("< s> im_end")
