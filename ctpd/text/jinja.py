"""A plain template as a chat template, so that other programs write conversations as they were trained on."""

from ctpd.text.plain import PlainTemplate


def chat_template(plain: PlainTemplate, *, adds_bos: bool) -> str:
    """The Jinja text that renders, with the special tokens, what `PlainTemplate` renders without them.

    Args:
        plain: the texts of the turns.
        adds_bos: whether training put BOS before the text.
    """
    turns = {"user": plain.user, "system": plain.system}
    lines = ["{{- bos_token -}}"] if adds_bos else []
    lines.append("{%- for message in messages -%}")
    before, after = _around(plain.assistant)
    lines += [
        "{%- if message['role'] == 'assistant' -%}",
        f"{{{{- {before} + message['content'] -}}}}",
        f"{{%- if loop.last -%}}{{{{- eos_token -}}}}{{%- else -%}}{{{{- {after} -}}}}{{%- endif -%}}",
    ]
    for role, text in turns.items():
        if text is not None:
            before, after = _around(text)
            lines.append(f"{{%- elif message['role'] == '{role}' -%}}")
            lines.append(f"{{{{- {before} + message['content'] + {after} -}}}}")
    lines.append("{%- else -%}{{- raise_exception('No text for the role ' + message['role']) -}}{%- endif -%}")
    lines.append("{%- endfor -%}")
    generation, _ = _around(plain.assistant)
    lines.append(f"{{%- if add_generation_prompt -%}}{{{{- {generation} -}}}}{{%- endif -%}}")
    return "\n".join(lines)


def _around(text: str) -> tuple[str, str]:
    """What stands before and behind the content, as literals of Jinja (which decodes Python's escapes)."""
    before, _, after = text.partition("{content}")
    return ascii(before), ascii(after)
