"""Evaluations leave no side effects, refuse clearly, and repeat themselves."""

import copy
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctpd.core.errors import UserError
from ctpd.text.pairs import Message
from ctpd.text.templates import ChatTemplate, Frame, fixed_variables
from harness.backends import SharedContextLM, open_vllm
from harness.comparability import differing_protocol
from harness.evaluate import Documents, check_column, evaluate_column
from harness.record import ColumnResult
from harness.suites import Column
from tests.fixtures.colours import NUM_DOCS, write_data


@pytest.mark.usefixtures("evaluation_mode")
def test_model_tokenizer_and_random_states_are_left_as_they_were(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path
) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    evaluate_column(model, tokenizer, choice, Documents(data_root, limit=2), batch_size=5)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert tokenizer.pad_token is None
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.usefixtures("evaluation_mode")
def test_the_mode_is_restored_after_an_error_too(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, tmp_path: Path
) -> None:
    model.train()
    with pytest.raises(UserError):
        evaluate_column(model, tokenizer, choice, Documents(tmp_path), batch_size=5)
    assert model.training


def test_a_limit_takes_the_first_documents_and_is_recorded(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path
) -> None:
    whole = evaluate_column(model, tokenizer, choice, Documents(data_root), batch_size=5)
    part = evaluate_column(model, tokenizer, choice, Documents(data_root, limit=4), batch_size=5)
    assert (whole.limit, whole.protocol.num_docs, whole.protocol.num_total) == (None, NUM_DOCS, NUM_DOCS)
    assert (part.limit, part.protocol.num_docs, part.protocol.num_total) == (4, 4, NUM_DOCS)
    assert part.documents == whole.documents[:4]
    assert part.protocol.task_hash != whole.protocol.task_hash


def timeless(result: ColumnResult) -> ColumnResult:
    return result.model_copy(update={"seconds": 0.0})


def test_a_result_can_be_written_and_read_and_repeats_itself(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path
) -> None:
    first, second = (evaluate_column(model, tokenizer, words, Documents(data_root), batch_size=5) for _ in range(2))
    assert ColumnResult.model_validate_json(first.model_dump_json()) == first
    assert timeless(first) == timeless(second)
    assert first.protocol.dtype == "float32"
    assert first.max_length == 160
    assert first.protocol.shots == 0


def test_two_mirrors_with_one_data_set_name_are_not_mixed_up(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path, tmp_path: Path
) -> None:
    """`datasets` caches both under one key; the second mirror must not be evaluated on the documents of the first."""
    other = write_data(tmp_path / "other", answers="one two three")
    results = [evaluate_column(model, tokenizer, choice, Documents(root), batch_size=5) for root in (data_root, other)]
    assert results[0].protocol.task_hash != results[1].protocol.task_hash
    (other / "someone/colours/test.jsonl").write_text((data_root / "someone/colours/test.jsonl").read_text())
    mended = evaluate_column(model, tokenizer, choice, Documents(other), batch_size=5)
    assert mended.protocol.task_hash == results[0].protocol.task_hash


def test_progress_counts_every_request_and_may_print_to_the_terminal(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    seen = []

    def report(done: int, total: int) -> None:
        seen.append((done, total))
        print("bar", file=sys.stderr)

    evaluate_column(model, tokenizer, choice, Documents(data_root, limit=4), batch_size=5, progress=report)
    assert seen == [(done, 12) for done in range(13)]
    assert capsys.readouterr().err.split() == ["bar"] * 13


def one_paragraph(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_data_names_the_data_set_and_how_to_get_it(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        evaluate_column(model, tokenizer, choice, Documents(tmp_path), batch_size=5)
    with pytest.raises(UserError, match="someone/colours"):
        check_column(choice, data_root=tmp_path)
    text = one_paragraph(error)
    assert "'someone/colours'" in text
    assert "hf download someone/colours --repo-type dataset" in text


def test_a_missing_file_of_a_mirror_is_one_paragraph_too(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path
) -> None:
    (data_root / "someone/colours/test.jsonl").unlink()
    with pytest.raises(UserError, match=r"test\.jsonl") as error:
        evaluate_column(model, tokenizer, choice, Documents(data_root), batch_size=5)
    one_paragraph(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2.0}, "has version 1.0, and the suite was written for 2.0"),
        ({"task": "colour_choise"}, "Did you mean 'colour_choice'"),
        ({"metric": "f1,none"}, "has no metric 'f1,none'"),
        ({"task": "colour_fixed", "shots": 5}, "takes no shots"),
        ({"folder": "no_such_folder"}, "no task or group 'colour_choice'"),
        ({"task": "colours"}, "no task or group 'colours'"),  # a tag
    ],
)
def test_what_the_suite_gets_wrong_is_refused(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        evaluate_column(
            model, tokenizer, choice.model_copy(update=changes), Documents(data_root, limit=2), batch_size=5
        )
    one_paragraph(error)


def test_prompts_longer_than_the_model_are_counted_and_no_room_to_generate_is_refused(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, words: Column, data_root: Path
) -> None:
    cut = evaluate_column(
        model, tokenizer, choice.model_copy(update={"shots": 5}), Documents(data_root, limit=2), batch_size=5
    )
    assert cut.truncated == 6
    short = LlamaForCausalLM(LlamaConfig(**(model.config.to_dict() | {"max_position_embeddings": 6})))
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        evaluate_column(short, tokenizer, words, Documents(data_root, limit=2), batch_size=5)


def test_a_chat_template_is_used_where_there_is_one_and_asked_for_in_vain_refused(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path
) -> None:
    chat = Documents(data_root, limit=2, chat_template=True)
    with pytest.raises(UserError, match="no chat template"):
        evaluate_column(model, tokenizer, choice, chat, batch_size=5)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    with_template = evaluate_column(model, chatty, choice, chat, batch_size=5)
    without = evaluate_column(model, chatty, choice, Documents(data_root, limit=2), batch_size=5)
    assert with_template.protocol.chat_template
    assert not without.protocol.chat_template
    assert with_template.protocol.task_hash != without.protocol.task_hash


def test_the_number_of_continuations_that_were_scored_by_themselves_is_in_the_result(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate_column(model, tokenizer, choice, Documents(data_root, limit=2), batch_size=5).alone == 0
    monkeypatch.setattr(SharedContextLM, "num_alone", 3)
    assert evaluate_column(model, tokenizer, choice, Documents(data_root, limit=2), batch_size=5).alone == 3


def test_vllm_that_is_not_installed_is_refused_with_the_way_to_get_it() -> None:
    with pytest.raises(UserError, match="needs vLLM") as caught:
        open_vllm("model", "model", precision="bfloat16")
    assert caught.value.fix is not None
    assert "ctpd[vllm]" in caught.value.fix


def test_vllm_is_given_the_model_its_tokenizer_and_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    module = types.ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = type("VLLM", (), {"__init__": lambda self, **arguments: given.update(arguments)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", module)
    found = open_vllm("a", "b", precision="bfloat16", revision="c" * 40, tokenizer_revision="d" * 40)
    assert isinstance(found, module.VLLM)
    assert given == {
        "pretrained": "a",
        "tokenizer": "b",
        "dtype": "bfloat16",
        "revision": "c" * 40,
        "tokenizer_revision": "d" * 40,
        "think_end_token": None,
    }


def test_prompts_are_built_once_for_many_models_and_anew_for_another_limit_or_a_template(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that reuses tasks is the one of tasks newly loaded, few-shot examples and all."""
    from lm_eval.api.task import ConfigurableTask

    built = []
    original = ConfigurableTask.fewshot_context

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        built.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ConfigurableTask, "fewshot_context", counted)
    other = copy.deepcopy(model)
    other.lm_head.weight.data.neg_()
    everything, four = Documents(data_root), Documents(data_root, limit=4)
    first = evaluate_column(model, tokenizer, choice, four, batch_size=5)
    second = evaluate_column(other, tokenizer, choice, four, batch_size=5)
    assert len(built) == 4
    assert second.protocol.task_hash == first.protocol.task_hash
    assert second.documents != first.documents
    whole = evaluate_column(model, tokenizer, choice, everything, batch_size=5)
    assert len(built) == 4 + NUM_DOCS
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    evaluate_column(model, chatty, choice, Documents(data_root, chat_template=True), batch_size=5)
    again = evaluate_column(model, tokenizer, choice, everything, batch_size=5)
    assert len(built) == 4 + 3 * NUM_DOCS
    assert timeless(again) == timeless(whole)
    monkeypatch.setattr("harness.evaluate._KEPT", {})
    fresh = evaluate_column(other, tokenizer, choice, four, batch_size=5)
    assert timeless(fresh) == timeless(second)


def test_a_result_says_whether_contexts_were_shared(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that could not share them has the same scores."""
    shared = evaluate_column(model, tokenizer, choice, Documents(data_root), batch_size=5)
    monkeypatch.setattr(model.config, "is_encoder_decoder", True)
    plain = evaluate_column(model, tokenizer, choice, Documents(data_root), batch_size=5)
    assert (shared.unshared, plain.unshared) == (None, "encoder and decoder")
    assert plain.documents == shared.documents


def test_templates_compiled_once_are_forgotten_afterwards() -> None:
    import lm_eval.utils

    from harness.isolation import compiled_templates

    method = lm_eval.utils.env.from_string
    with compiled_templates():
        assert lm_eval.utils.env.from_string("{{a}}") is lm_eval.utils.env.from_string("{{a}}")
        assert lm_eval.utils.apply_template("{{a}} {{b}}", {"a": 1, "b": 2}) == "1 2"
    assert lm_eval.utils.env.from_string == method


DATED = (
    "{% for m in messages %}[{{ date_string }}{{ strftime_now('%d %b %Y') }}{{ mood }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def prompts_of(seen: list[str], model: Any, tokenizer: Any, column: Column, documents: Documents) -> ColumnResult:
    """Evaluate, with the rendered prompts in ``seen``."""
    original = SharedContextLM.apply_chat_template

    def noted(self: Any, *args: Any, **options: Any) -> str:
        seen.append(original(self, *args, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedContextLM, "apply_chat_template", noted)
        return evaluate_column(model, tokenizer, column, documents, batch_size=5)


def test_an_evaluation_renders_with_the_date_and_the_variables_of_training_and_records_them(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path
) -> None:
    """Not with today's date; the same template with other variables is no comparable result."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = DATED
    variables = fixed_variables({"mood": "!"})
    documents = Documents(data_root, limit=2, chat_template=True, template_variables=variables)
    column = choice.model_copy(update={"shots": 0})
    seen: list[str] = []
    found = prompts_of(seen, model, chatty, column, documents)
    side = ChatTemplate(chatty, {"mood": "!"})
    (frame,) = side.frames([(Message("user", "x"),)], where=[""])
    assert isinstance(frame, Frame)
    assert frame.before == "[26 Jul 202426 Jul 2024!]x[a]"
    assert seen
    assert all(text.startswith("[26 Jul 202426 Jul 2024!]") for text in seen)
    assert chatty.chat_template == DATED
    assert found.template is not None
    assert found.template.variables == {"date_string": "26 Jul 2024", "mood": "!"}
    other = evaluate_column(
        model, chatty, column, documents._replace(template_variables=fixed_variables({"mood": "?"})), batch_size=5
    )
    assert differing_protocol(found, other) == {"template_variables.mood": " (! and ?)"}
    assert differing_protocol(found, found) == {}
    assert "template" in differing_protocol(found, found.model_copy(update={"template": None}))


def test_reasoning_is_not_scored_and_a_template_that_asks_for_it_needs_its_end(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model writes up to `think_end_token` is left out, and stop strings in it do not end a text."""
    texts = ["a\n\nb</think>\n\nred\n\nmore", "no end"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    lm = SharedContextLM(model, tokenizer, batch_size=2, progress=None, think_end_token="</think>")
    assert [lm._answer(row, ["\n\n"]) for row in rows] == ["red", "no end"]
    assert lm.num_unfinished == 1
    finished = lm._finish(["\n\n"])
    ends = [n for n in range(1, len(rows[0]) + 1) if finished(rows[0][:n])]
    assert tokenizer.decode(rows[0][: ends[0]]) == "a\n\nb</think>\n\nred\n\n"
    plain = SharedContextLM(model, tokenizer, batch_size=2, progress=None)
    assert plain._answer(rows[0], ["\n\n"]) == "a"
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = DATED
    chat = Documents(data_root, limit=2, chat_template=True, template_variables={"enable_thinking": True})
    with pytest.raises(UserError, match="`enable_thinking: true`, and no `think_end_token`"):
        evaluate_column(model, chatty, words, chat, batch_size=5)
    found = evaluate_column(model, chatty, words, chat._replace(think_end_token="</think>"), batch_size=5)
    assert found.think_end_token == "</think>"
    assert found.unfinished == 2


def test_a_special_token_that_ends_reasoning_is_found_by_its_id(model: LlamaForCausalLM, tokenizer: Any) -> None:
    """Texts are decoded without special tokens, so lm-eval takes such a one as a number."""
    marked = copy.deepcopy(tokenizer)
    marked.add_special_tokens({"additional_special_tokens": ["<t>"]})
    lm = SharedContextLM(model, marked, batch_size=2, progress=None, think_end_token="<t>")
    assert lm.think_end_token == marked.convert_tokens_to_ids("<t>")
    assert lm._answer(marked("a b<t> red. more")["input_ids"], ["."]) == "red"
    assert lm._answer(marked("a b")["input_ids"], ["."]) == "a b"
