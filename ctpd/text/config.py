"""Configuration of the pairs; imports neither torch nor tokenizers."""

from typing import Literal, Self

from pydantic import model_validator

from ctpd.core.config import Config, PositiveInt, Share, Text

Form = Literal["transcript", "text"]


class Columns(Config):
    """The columns of a data set under our names, where it has others (docs/data.md#columns)."""

    prompt: Text | None = None
    """The column of the prompt: a text, or a list of messages. Left out: `prompt`."""
    input: Text | None = None
    """A column of texts that follow the prompt on a new line where they are not empty (`input` of Alpaca's form)."""
    system: Text | None = None
    """The column of the system message. Left out: `system`."""
    chosen: Text | None = None
    """The column of the better response. Left out: `chosen`."""
    rejected: Text | None = None
    """The column of the worse response. Left out: `rejected`."""
    responses: Text | None = None
    """A column with a list of both responses, the better one first, in place of `chosen` and `rejected`."""

    @model_validator(mode="after")
    def _names_each_once(self) -> Self:
        given = self.given
        if not given:
            raise ValueError("`columns` names no column")
        if self.responses is not None and (self.chosen is not None or self.rejected is not None):
            raise ValueError("`responses` is one column with both responses; give it, or `chosen` and `rejected`")
        twice = [name for name in given.values() if list(given.values()).count(name) > 1]
        if twice:
            raise ValueError(f"`columns` names '{twice[0]}' twice")
        return self

    @property
    def given(self) -> dict[str, str]:
        """Our name -> the data's, of those that are given."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: column for name, column in named.items() if column is not None}


class Layout(Config):
    """How rows of a data set hold pairs, where it is not the form that needs no word."""

    columns: Columns | None = None
    """The columns under our names."""
    form: Form | None = None
    """What texts are: transcripts of conversations, or texts even if they look like transcripts."""


class PairsConfig(Config):
    """Which pairs are used, and their lengths in tokens of either model."""

    max_tokens: PositiveInt
    """Longest row, prompt and response together, end token included, in tokens of either model. A longer response is
    cut at the last common boundary at which both models fit, and has no end span."""
    max_prompt_tokens: PositiveInt
    """Longest prompt in tokens of either model."""
    long_prompt: Literal["drop", "cut"] = "drop"
    """What happens to a longer prompt: its pair is left out, or the start of its last user message is cut."""
    max_dropped: Share = 0.05
    """Largest share of a split's pairs that may be dropped; with more, the run is refused."""
    select: Literal["all", "shortest"] = "all"
    """Which pairs `limit` keeps: the first, or those with the fewest characters. Only pairs that pass the checks
    without tokens (empty, equal, special_token_text) are selected."""
    limit: PositiveInt | None = None
    """Number of pairs of each split to keep; default: all."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.select == "shortest" and self.limit is None:
            raise ValueError("`select: shortest` needs a `limit`")
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"`max_prompt_tokens: {self.max_prompt_tokens}` leaves no room for a response in "
                f"`max_tokens: {self.max_tokens}`"
            )
        return self
