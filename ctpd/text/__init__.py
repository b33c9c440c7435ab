"""From preference pairs to tokens and aligned spans (METHOD 2 and 3).

No torch and no files: texts and tokenizers come in, arrays go out.
"""
