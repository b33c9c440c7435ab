"""Configuration of the pairs; imports neither torch nor tokenizers."""

from typing import Literal, Self

from pydantic import model_validator

from ctpd.core.config import Config, PositiveInt, Share


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
