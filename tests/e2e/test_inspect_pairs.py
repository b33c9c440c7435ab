"""`ctpd inspect pairs`: what each model will read, with and without a store."""

import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ctpd.app import Experiment
from ctpd.cli import draw
from ctpd.core.store import Store
from ctpd.inspection.pairs import read_pairs
from ctpd.pipeline.references import External
from ctpd.pipeline.runtime import Runtime
from ctpd.pipeline.stage import Work
from ctpd.pipeline.stages.pairs import ModelInput
from ctpd.recipe import PlainSpec
from ctpd.text.prepared_files import DROPPED, read_meta
from tests.conftest import Cli, SmokeRun
from tests.fixtures.tokenizers import with_template

CHAT = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"


def test_rows_of_a_finished_recipe_are_those_of_the_store(cli: Cli, smoke: SmokeRun) -> None:
    outcome = cli("inspect", "pairs", "testbed-smoke", "--store", smoke.store, "--show", 2, "--json")
    assert outcome.code == 0, outcome.err
    first, second = json.loads(outcome.out)
    assert first["split"] == "train"
    assert first["rows"].keys() == {"teacher", "student"}
    for pair in (first, second):
        for sides in pair["rows"].values():
            chosen, rejected = sides["chosen"], sides["rejected"]
            assert chosen["prompt"] == rejected["prompt"]
            assert chosen["response"] != rejected["response"]
            assert chosen["end"]
            assert 0 < chosen["scored"] < chosen["tokens"]
    text = cli("inspect", "pairs", "testbed-smoke", "--store", smoke.store).out
    assert text.count("pair ") == 3
    assert "\x1b" not in text
    assert re.search(r"teacher +prompt", text)
    assert "tokens," in text


def test_an_empty_store_says_what_to_run_first(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("inspect", "pairs", "testbed-smoke", "--store", tmp_path / "s")
    assert outcome.code == 2
    assert f"ctpd train testbed-smoke --store {tmp_path / 's'}" in outcome.err
    assert not (tmp_path / "s").exists()


@pytest.fixture
def recipe(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `init` writes for a chat model and 60 pairs, of which the last has a long response."""
    monkeypatch.chdir(tmp_path)
    tokenizer = with_template("byte_bpe", CHAT)
    tokenizer.save_pretrained("model")
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=512)
    ).save_pretrained("model")  # fmt: skip
    rows = [{"prompt": f"Human: {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(60)]
    rows[0]["chosen"] = "long " * 2000
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = cli("init", "--teacher", "model", "--student", "model", "--data", "pairs.jsonl", "--to", "my recipe.yaml")
    assert made.code == 0, made.err
    return Path("my recipe.yaml")


def test_a_recipe_of_ones_own_is_shown_before_anything_is_built(cli: Cli, recipe: Path) -> None:
    plan = cli("run", recipe, "--plan")
    assert plan.code == 0, plan.err
    (hint,) = re.findall(r"^Note: What each model reads of the pairs: ctpd (.*)$", plan.out, re.MULTILINE)
    assert shlex.split(hint) == ["inspect", "pairs", "my recipe.yaml"]
    outcome = cli(*shlex.split(hint), "--json")
    assert outcome.code == 0, outcome.err
    pairs = json.loads(outcome.out)
    assert len(pairs) == 3
    cut, whole = pairs[0]["rows"]["student"]["chosen"], pairs[1]["rows"]["student"]["chosen"]
    assert cut["end"] is None
    assert whole == {
        "prompt": "<s>user\nHuman: 1?</s>\n<s>assistant\n", "response": "It is 1.", "between": "", "end": "</s>",
        "tokens": whole["tokens"], "scored": whole["scored"],
    }  # fmt: skip
    ids = AutoTokenizer.from_pretrained("model")(whole["prompt"] + "It is 1.</s>", add_special_tokens=False)[
        "input_ids"
    ]
    assert whole["tokens"] == len(ids)
    assert "no end: the response was cut" in cli(*shlex.split(hint)).out
    assert not Path("runs").exists()


SHAREGPT = [
    {"from": "system", "value": "You are brief. \x1b[31m"},
    {"from": "human", "value": "user"},
    {"from": "gpt", "value": "So."},
    {"from": "human", "value": "And " * 30 + "then?"},
]


def test_roles_ends_and_what_is_scored_are_shown_in_colour_and_whole(
    cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a narrow terminal; text of the data has no effect on it, and NO_COLOR none of the colours."""
    row = {
        "conversations": SHAREGPT,
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    Path("pairs.jsonl").write_text((json.dumps(row) + "\n") * 60)
    outcome = cli("inspect", "pairs", recipe, "--show", 1)
    assert outcome.code == 0, outcome.err
    assert re.search(r"roles +system, user, assistant, user\n", outcome.out)
    assert "\x1b" not in outcome.out
    assert "⟨U+001B⟩[31m" in outcome.out
    (found,) = read_pairs(Experiment(str(recipe)).stages.pairs, Store(Path("runs")), show=1, source=str(recipe))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    drawn = draw.pair(found, number=1)
    for style, text in (
        ("35", "You·are·brief.·⟨U+001B⟩[31m"),
        ("36", "user"),
        ("33", "So."),
        ("32", "Yes."),
        ("1;32", "</s>"),
    ):
        assert re.search(rf"\x1b\[{style}m {{0,1}}{re.escape(text)}\x1b\[0m", drawn), text
    assert "…" not in drawn
    assert re.sub(r"\s", "", click.unstyle(drawn)).count("And·") == 60  # both models, every word
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[(1;)?3\dm", draw.pair(found, number=1))


def test_pairs_are_shown_in_the_templates_of_published_models(
    cli: Cli, shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("qwen2_5", "llama3_2")
    monkeypatch.chdir(tmp_path)
    for name in names:
        shutil.copytree(shared_dir / "data" / "tokenizers" / name, tmp_path / name)
        LlamaConfig(
            vocab_size=262144, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ).save_pretrained(name)
    text = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant: "
    Path("hh.jsonl").write_text((json.dumps({"chosen": f"{text}Yes.", "rejected": f"{text}No."}) + "\n") * 3)
    made = cli("init", "--teacher", names[0], "--student", names[1], "--data", "hh.jsonl")
    assert made.code == 0, made.err
    assert made.out.splitlines()[0] == (
        "hh.jsonl: 3 rows; transcripts, whose turns become messages (`form: transcript`); read: chosen, rejected."
    )
    (pair, _, _) = json.loads(cli("inspect", "pairs", "recipe.yaml", "--json").out)
    assert [turn["role"] for turn in pair["turns"]] == ["user", "assistant", "user"]
    for sides in pair["rows"].values():
        assert (sides["chosen"]["response"], sides["rejected"]["response"]) == ("Yes.", "No.")
        assert sides["chosen"]["end"]
        assert sides["chosen"]["prompt"].count("And?") == 1


def test_a_plan_refuses_data_that_its_columns_do_not_fit(cli: Cli, recipe: Path) -> None:
    """In one paragraph, before anything is run."""
    text, said = recipe.read_text(), '{path: "pairs.jsonl"}'
    recipe.write_text(text.replace(said, '{path: "pairs.jsonl", columns: {prompt: promt}}'))
    outcome = cli("run", recipe, "--plan")
    assert outcome.code == 2
    assert "the column 'promt', which `columns` names as `prompt`, is missing" in outcome.err
    assert "Did you mean 'prompt'?" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    recipe.write_text(text)
    transcript = {side: f"\n\nHuman: Why?\n\nAssistant: {side}." for side in ("chosen", "rejected")}
    Path("pairs.jsonl").write_text((json.dumps(transcript) + "\n") * 60)
    outcome = cli("run", recipe, "--plan")
    assert outcome.code == 2
    assert "Say `form: transcript`" in outcome.err
    recipe.write_text(text.replace(said, '{path: "pairs.jsonl", form: transcript}'))
    assert cli("run", recipe, "--plan").code == 0


def test_the_plan_says_that_prompts_are_templated_in_training_alone(cli: Cli, recipe: Path) -> None:
    said = "trained in the chat template (`template: chat`) and evaluated without it"
    assert said not in cli("run", recipe, "--plan").out
    recipe.write_text(recipe.read_text().replace("chat_template: true", "chat_template: false"))
    assert f"The teacher and student are {said}" in cli("run", recipe, "--plan").out


STRIPS = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def test_a_templates_own_rendering_is_shown_beside_the_rows(cli: Cli, tmp_path: Path) -> None:
    """Of conversations that templates are known to treat differently, or of pairs; refused ones with the template's words."""
    with_template("byte_bpe", STRIPS).save_pretrained(tmp_path / "model")
    found = json.loads(cli("inspect", "template", tmp_path / "model", "--json").out)["tokenizer"]
    assert found["differences"] == {"response": 1}
    assert found["examples"]["response"][1].endswith("</think>\n\nA key.</s>\n")
    assert [(("no system" in why), number) for why, number in found["refused"].items()] == [(True, 1)]
    assert found["end_tokens"] == ["</s>"]
    assert found["ends_from"] == ["template"]
    merged = json.loads(cli("inspect", "template", tmp_path / "model", "--merge-system", "--json").out)["tokenizer"]
    assert merged["refused"] == {}
    assert merged["rows"] == found["rows"] + 2
    outcome = cli("inspect", "template", tmp_path / "model")
    assert outcome.code == 0, outcome.err
    assert "the response is changed, such as its reasoning removed" in outcome.out
    assert "pairs refused" in outcome.out


def test_the_templates_of_a_recipe_are_shown_on_its_pairs_and_a_bad_row_is_listed(cli: Cli, recipe: Path) -> None:
    outcome = cli("inspect", "template", recipe, "--json", "--limit", 5)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert {name: (one["rows"], one["differences"]) for name, one in found.items()} == {
        "teacher": (10, {}),
        "student": (10, {}),
    }
    assert cli("inspect", "template", recipe, "--end-token", "x").code == 2


def test_a_row_that_is_no_pair_is_listed_with_its_file_and_moves_no_other(recipe: Path, tmp_path: Path) -> None:
    data = Path("pairs.jsonl")
    bad = {"prompt": "Why?", "chosen": [{"role": "assistant", "content": None}], "rejected": "No."}
    data.write_text(data.read_text() + json.dumps(bad) + "\n")
    stage = Experiment(str(recipe)).stages.pairs
    work = Work(tmp_path / "built", Runtime(), lambda done, total: None, writes=True, folders={})
    work.folder.mkdir()
    stage.build(work)
    (line,) = (work.folder / DROPPED).read_text().splitlines()
    assert json.loads(line) == {
        "split": "train",
        "source": str(data),
        "row": "60",
        "reason": "null_content",
        "detail": "column 'chosen', message 0: the content is nothing (null), not a string",
    }
    meta = read_meta(work.folder)
    assert len(meta["pair_ids"]) == 60
    assert meta["end_tokens"] == {"teacher": "</s> (template)", "student": "</s> (template)"}


def test_a_row_of_one_of_several_files_is_listed_with_that_file_and_its_row_there(recipe: Path, tmp_path: Path) -> None:
    lines, shards = Path("pairs.jsonl").read_text().splitlines(keepends=True), Path("shards")
    bad = {"prompt": "Why?", "chosen": [{"role": "assistant", "content": None}], "rejected": "No."}
    equal = {"prompt": "Why?", "chosen": "No.", "rejected": "No."}
    shards.mkdir()
    (shards / "b.jsonl.gz").write_bytes(gzip.compress("".join([*lines[40:], json.dumps(bad)]).encode()))
    (shards / "a.jsonl.gz").write_bytes(gzip.compress("".join([*lines[:40], json.dumps(equal)]).encode()))
    recipe.write_text(recipe.read_text().replace("pairs.jsonl", "shards/*.gz"))
    stage = Experiment(str(recipe)).stages.pairs
    assert stage.most_pairs == 62
    work = Work(tmp_path / "built", Runtime(), lambda done, total: None, writes=True, folders={})
    work.folder.mkdir()
    stage.build(work)
    found = [json.loads(line) for line in (work.folder / DROPPED).read_text().splitlines()]
    assert found == [
        {"split": "train", "source": "shards/a.jsonl.gz", "row": "40", "reason": "equal", "detail": ""},
        {
            "split": "train",
            "source": "shards/b.jsonl.gz",
            "row": "20",
            "reason": "null_content",
            "detail": "column 'chosen', message 0: the content is nothing (null), not a string",
        },
    ]
    ids = read_meta(work.folder)["pair_ids"]
    assert ids == [str(number) for number in range(61) if number != 40], "of all files together"


def test_only_pairs_in_a_chat_template_have_its_rendering_in_their_key() -> None:
    source = External("model", "digest")
    plain = ModelInput(source, PlainSpec(user="{content}", assistant="{content}"))
    assert plain.identity.keys() == {"tokenizer", "template", "variables"}
    assert ModelInput(source, "chat").identity.keys() == {"tokenizer", "template", "variables", "rendering"}
    assert ModelInput(source, "chat", {}, "</s>", "merge").identity["system"] == "merge"
