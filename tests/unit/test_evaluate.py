"""Evaluation on tiny random models and tasks written here: lm-eval's own scores, no side effects, clear refusals."""

import copy
import json
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctpd.core.errors import UserError
from harness.backends import SharedContextLM, open_vllm
from harness.evaluate import Documents, check_column, evaluate_column
from harness.record import ColumnResult
from harness.suites import Column

NUM_DOCS = 12


@pytest.fixture(autouse=True)
def _own_dataset_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """lm-eval's own entry point, which some tests compare with, caches data sets by the text of their card only."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens and an end token; no pad token, which lm-eval adds to whatever it is given."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=160,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)


def write_data(root: Path, *, answers: str = "red blue green") -> Path:
    """A mirror of the hub that holds one data set, as the testbed writes its own."""
    folder = root / "someone" / "colours"
    folder.mkdir(parents=True)
    rows = [
        {"question": f"Which colour has item {i * 7}?", "choices": answers.split(), "label": i % 3}
        for i in range(NUM_DOCS)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = {"configs": [{"config_name": "main", "data_files": [{"split": "test", "path": "test.jsonl"}]}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return root


def write_tasks(folder: Path) -> Path:
    """A multiple-choice task, a generation task and a task that fixes its shots at 0."""
    folder.mkdir(parents=True)
    mean = {"aggregation": "mean", "higher_is_better": True}
    shared = {
        "dataset_path": "someone/colours",
        "dataset_name": "main",
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
        "metadata": {"version": 1.0},
        "tag": "colours",
    }
    choice = shared | {
        "task": "colour_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [mean | {"metric": "acc"}, mean | {"metric": "acc_norm"}],
    }
    generation = shared | {
        "task": "colour_words",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "metric_list": [mean | {"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {
                "name": "letter",
                "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}],
            },
        ],
    }
    fixed = choice | {"task": "colour_fixed", "num_fewshot": 0}
    for config in (choice, generation, fixed):
        (folder / f"{config['task']}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    return write_data(tmp_path / "hub")


@pytest.fixture
def choice(tmp_path: Path) -> Column:
    return Column(
        name="Choice",
        task="colour_choice",
        metric="acc_norm,none",
        version=1.0,
        shots=1,
        also=("acc,none",),
        folder=str(write_tasks(tmp_path / "tasks")),
    )


@pytest.fixture
def words(choice: Column) -> Column:
    changes = {"metric": "exact_match,whole", "also": ("exact_match,letter",), "shots": 0}
    return choice.model_copy(update={"name": "Words", "task": "colour_words", **changes})


def stock(model: LlamaForCausalLM, tokenizer: Any, column: Column, data_root: Path, **options: Any) -> Any:
    """The same column by lm-eval's own model and entry point."""
    import contextlib

    manager = TaskManager(include_defaults=False, include_path=[str(column.folder)])
    with contextlib.chdir(data_root):
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=5)
        return simple_evaluate(lm, tasks=[column.task], num_fewshot=column.shots, task_manager=manager, **options)


@pytest.fixture
def evaluation_mode(model: LlamaForCausalLM) -> Iterator[None]:
    yield
    model.eval()


def test_multiple_choice_scores_are_those_of_lm_evals_own_model(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path
) -> None:
    """Logits of the last positions only, the same requests: same metrics, log-probabilities to float noise."""
    ours = evaluate_column(model, tokenizer, choice, Documents(data_root), batch_size=5)
    theirs = stock(model, tokenizer, choice, data_root)
    assert ours.value == theirs["results"]["colour_choice"]["acc_norm,none"]
    assert ours.stderr == pytest.approx(theirs["results"]["colour_choice"]["acc_norm_stderr,none"])
    assert ours.also == {"acc,none": theirs["results"]["colour_choice"]["acc,none"]}
    samples = theirs["samples"]["colour_choice"]
    assert ours.documents == tuple((sample["doc_hash"], sample["acc_norm"]) for sample in samples)
    assert 0 < ours.value < 1
    assert ours.value == pytest.approx(np.mean([score for _, score in ours.documents]))


def test_log_probabilities_are_those_of_full_logits(model: LlamaForCausalLM, tokenizer: Any) -> None:
    """Continuations of other lengths, padding, and prompts that end in token 0, lm-eval's padding."""
    from lm_eval.api.instance import Instance

    zero = tokenizer.decode([0])
    pairs = [("A" * 9, "xyz"), ("B" * 30, "x"), ("C", "long answer " * 3), ("D" + zero, zero * 3), ("E" * 12, zero)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    ours = SharedContextLM(model, tokenizer, batch_size=3, progress=None)
    theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=3)
    assert ours._keeps_last_logits
    for mine, other in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]


def test_only_as_many_logits_are_computed_as_the_longest_continuation_needs(
    model: LlamaForCausalLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance

    lm = SharedContextLM(model, tokenizer, batch_size=2, progress=None)
    shapes = []
    monkeypatch.setattr(
        model.lm_head,
        "forward",
        lambda h: shapes.append(h.shape) or torch.nn.functional.linear(h, model.lm_head.weight),
    )
    lm.loglikelihood(
        [Instance("loglikelihood", {}, ("A" * 80, "xyz"), 0), Instance("loglikelihood", {}, ("B" * 78, "xy"), 0)]
    )
    assert [tuple(shape[:2]) for shape in shapes] == [(2, 3 + 3)]  # padding 3, continuation 3


def test_a_model_without_logits_to_keep_falls_back_to_full_logits(tokenizer: Any, model: LlamaForCausalLM) -> None:
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(input_ids=input_ids)

    plain = Plain(model.config).eval()
    lm = SharedContextLM(plain, tokenizer, batch_size=2, progress=None)
    assert not lm._keeps_last_logits
    assert lm._model_call(torch.ones(1, 7, dtype=torch.long)).shape[:2] == (1, 7)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers' old name
def test_an_adapter_on_a_model_is_evaluated_as_the_merged_model_is(
    model: LlamaForCausalLM, tokenizer: Any, choice: Column, data_root: Path
) -> None:
    """A PEFT model computes only the last logits too, and is left unchanged."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.eval()
    assert SharedContextLM(adapted, tokenizer, batch_size=2, progress=None)._keeps_last_logits
    ours = evaluate_column(adapted, tokenizer, choice, Documents(data_root), batch_size=5)
    theirs = stock(adapted.merge_and_unload(), tokenizer, choice, data_root)
    assert ours.documents == tuple(
        (sample["doc_hash"], sample["acc_norm"]) for sample in theirs["samples"]["colour_choice"]
    )


def test_generation_scores_are_those_of_lm_evals_own_model(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path
) -> None:
    ours = evaluate_column(model, tokenizer, words, Documents(data_root), batch_size=5)
    theirs = stock(model, tokenizer, words, data_root)
    assert ours.value == theirs["results"]["colour_words"]["exact_match,whole"]
    assert ours.also == {"exact_match,letter": theirs["results"]["colour_words"]["exact_match,letter"]}
    whole = [sample for sample in theirs["samples"]["colour_words"] if sample["filter"] == "whole"]
    assert ours.documents == tuple((sample["doc_hash"], sample["exact_match"]) for sample in whole)


def test_the_task_hash_is_the_one_that_lm_evals_tracker_reports(
    model: LlamaForCausalLM, tokenizer: Any, words: Column, data_root: Path, tmp_path: Path
) -> None:
    from lm_eval.loggers import EvaluationTracker

    results = stock(model, tokenizer, words, data_root, limit=3)
    EvaluationTracker(output_path=str(tmp_path / "out")).save_results_aggregated(results, results["samples"])
    ours = evaluate_column(model, tokenizer, words, Documents(data_root, limit=3), batch_size=5)
    assert ours.protocol.task_hash == results["task_hashes"]["colour_words"]


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


def test_vllm_that_is_not_installed_is_refused_with_the_way_to_get_it() -> None:
    with pytest.raises(UserError, match="needs vLLM") as caught:
        open_vllm("model", "model", precision="bfloat16")
    assert caught.value.fix is not None
    assert "ctpd[vllm]" in caught.value.fix


def test_vllm_is_given_the_model_its_tokenizer_and_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    module = types.ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = lambda **arguments: given.update(arguments) or "the model"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", module)
    assert open_vllm("a", "b", precision="bfloat16", revision="c" * 40, tokenizer_revision="d" * 40) == "the model"
    assert given == {
        "pretrained": "a",
        "tokenizer": "b",
        "dtype": "bfloat16",
        "revision": "c" * 40,
        "tokenizer_revision": "d" * 40,
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
