"""From preference pairs to tokens and aligned spans (docs/method.md#data-step, docs/method.md#aligned-spans).

No torch and no files: texts and tokenizers come in, arrays go out.
"""
