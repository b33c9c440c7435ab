"""Models as chains: what a training changes of a model, and what it leaves as it was."""

from pathlib import Path

from ctpd.pipeline.graph import Stage, Work
from ctpd.pipeline.references import External, ModelRef

HUB = External("org/name", "hub:org/name@abc", "abc")


def build(work: Work) -> None:
    raise AssertionError("a plan builds nothing")


def test_a_fine_tuned_hub_model_keeps_the_pinned_revision_of_its_tokenizer() -> None:
    """The model is an artifact then; the tokenizer still comes from the hub, at the commit of the recipe."""
    trained = ModelRef("student", HUB, HUB).trained(Stage("train", 1, {}, build, "t"), adapter=False)
    located = trained.located("model", {"model": Path("store")})
    assert (located.folder, located.revision) == (str(Path("store") / "model"), None)
    assert (located.tokenizer, located.tokenizer_revision) == ("org/name", "abc")


def test_an_adapter_stands_on_the_pinned_base() -> None:
    stage = Stage("train", 1, {}, build, "t")
    chain = ModelRef("student", HUB, HUB).trained(stage, adapter=True).chain()
    assert chain["base"] == "org/name"
    assert chain["revision"] == chain["tokenizer_revision"] == "abc"
    assert chain["adapters"] == [f"store:train/{stage.key}"]
