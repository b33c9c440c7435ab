"""The benchmarks' own arithmetic: inputs, ratios, claims, tables. Measured values are not tested."""

import importlib.util
import json
import math
import mmap
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.figures import Bar, Line, bars, log_lines
from benchmarks.inputs import DATA, EOS, MODEL, TOKENIZER, Shape, as_json, make_inputs, text_rows, token_pairs, units
from benchmarks.measuring import machine_seconds, peak_mib, ratios, reset_peak, resident_mib
from benchmarks.pairs import recombined
from benchmarks.pipeline import passes, stage_seconds
from benchmarks.report import Claim, Result, Table, claim_row, spread, write
from benchmarks.roofline import Product, products
from benchmarks.scaling import exponent
from benchmarks.sharing import bound, with_prompt
from benchmarks.step import DPO, EXACT, EXPECTED, PRECOMPUTED, SCENARIOS, TRL, check_losses, claims_of
from ctpd.text.pairs import Message, Pair

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = Shape(batch=2, seq_len=24, prompt_len=6, words=40, hidden=16, layers=1, heads=2, vocab=64)


def test_token_rows_are_what_the_word_tokenizer_makes_of_the_texts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shape = Shape(**{**as_json(TINY), "ragged": True})
    make_inputs(shape, 6, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / TOKENIZER))
    rows = [json.loads(line) for line in (tmp_path / DATA).read_text().splitlines()]
    assert rows == text_rows(shape, 6)
    for row, pair in zip(rows, token_pairs(shape, 6), strict=True):
        for side in ("chosen", "rejected"):
            assert tokenizer(row["prompt"] + row[side])["input_ids"] + [EOS] == pair.prompt + getattr(pair, side)


def test_first_rows_do_not_depend_on_how_many_follow() -> None:
    assert token_pairs(TINY, 8)[:3] == token_pairs(TINY, 3)


def test_rows_have_the_exact_length_and_ragged_ones_at_most_that() -> None:
    lengths = {len(p.prompt) + len(side) for p in token_pairs(TINY, 5) for side in (p.chosen, p.rejected)}
    assert lengths == {TINY.seq_len}
    ragged = token_pairs(Shape(**{**as_json(TINY), "ragged": True}), 50)
    lengths = {len(p.prompt) + len(side) for p in ragged for side in (p.chosen, p.rejected)}
    assert max(lengths) == TINY.seq_len
    assert len(lengths) > 5


def test_recombined_pairs_have_the_sentences_and_lengths_of_the_given_ones() -> None:
    given = [
        Pair(str(i), (Message("user", f"Is it {i}? Why?"),), f"It is {i}.\n\nSo it is. Yes", f"No {i}. Never.")
        for i in range(3)
    ]
    pairs = list(recombined(given, 50))
    assert pairs == [*recombined(given, 50)]
    assert list(recombined(given, 7)) == pairs[:7]
    sentences = {f"It is {i}.\n\n" for i in range(3)} | {"So it is. ", "Yes"}
    assert all(re.sub("|".join(map(re.escape, sentences)), "", pair["chosen"]) == "" for pair in pairs)
    assert len({pair["chosen"] for pair in pairs}) > 10
    assert all(1 <= pair["prompt"].count("?") <= 2 for pair in pairs)


@pytest.mark.parametrize("ragged", [False, True])
def test_inputs_are_those_of_the_comparison_this_project_was_specified_with(
    tmp_path: Path, shared_dir: Path, ragged: bool
) -> None:
    path = shared_dir / "bench" / "trl_dpo.py"
    if not path.exists():
        pytest.skip(reason="the folder `shared` has no bench/trl_dpo.py")
    spec = importlib.util.spec_from_file_location("trl_dpo", path)
    assert spec is not None
    assert spec.loader is not None
    theirs: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    shape = Shape(**{**as_json(TINY), "ragged": ragged})
    words = [f"--{name.replace('_', '-')}={value}" for name, value in as_json(shape).items() if name != "ragged"]
    arguments = theirs.parse_args([*words, "--steps=3", *(["--ragged"] if ragged else [])])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    theirs.build_fixtures(arguments, tmp_path / "theirs")
    make_inputs(shape, shape.batch * 3, tmp_path / "ours")
    assert (tmp_path / "theirs" / "data.jsonl").read_text() == (tmp_path / "ours" / DATA).read_text()
    expected = load_file(tmp_path / "theirs" / "model" / "model.safetensors")
    found = load_file(tmp_path / "ours" / MODEL / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("longest", [1, 3])
def test_units_cover_every_completion_token_in_order(longest: int) -> None:
    pairs = token_pairs(TINY, 4)
    unit, counts = units(pairs, longest=longest, seed=0)
    completions = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    for ids, completion, count in zip(unit, completions, counts, strict=True):
        sizes = np.bincount(ids)
        assert len(ids) == len(completion)
        assert (np.diff(ids) >= 0).all()
        assert (len(sizes), sizes.min() >= 1, sizes.max() <= longest) == (count, True, True)


def test_trainer_takes_the_rows_in_the_order_of_the_other_side() -> None:
    from benchmarks.ours import rows_for
    from ctpd.train.collator import StepSampler

    pairs = token_pairs(TINY, 8)
    rows = rows_for(None, pairs, {"method": "sft"})
    sampler = StepSampler(rows.item_lengths, per_step=2, micro_batch=2, seed=0)
    for step, items in enumerate(sampler):
        batch = rows.collate(items).tokens.input_ids.tolist()
        assert sorted(batch) == sorted(pair.prompt + pair.chosen for pair in pairs[2 * step : 2 * step + 2])


def test_ratios_are_taken_inside_a_round_and_the_median_is_judged() -> None:
    found = {"ours": [{"s": 1.0}, {"s": 4.0}, {"s": 1.5}], "theirs": [{"s": 2.0}, {"s": 4.0}, {"s": 2.0}]}
    values = ratios(found, "s", of="ours", to="theirs")
    assert values == [0.5, 1.0, 0.75]
    assert Claim("", "at most", 0.75, values).met
    assert not Claim("", "at most", 0.7, values).met
    assert Claim("", "at least", 0.7, values).met
    assert Claim("", "at most", None, values).met is None
    assert spread(values) == "0.75 (0.5 to 1)"
    assert spread([0.5]) == "0.5"


def test_losses_that_differ_are_refused() -> None:
    def found(ours: tuple[float, ...], theirs: tuple[float, ...]) -> dict[str, list[dict[str, Any]]]:
        return {DPO: [{"losses": list(ours)}], TRL: [{"losses": list(theirs)}], PRECOMPUTED: [{"losses": list(theirs)}]}

    ours = (EXPECTED[0], EXACT[1], *EXPECTED[2:])
    check_losses(found(ours, EXPECTED[:3]), dtype="float32", expected=EXPECTED)
    with pytest.raises(RuntimeError, match=rf"{DPO}: loss 0\.704426 at step 2, where 0\.704442"):
        check_losses(found(EXPECTED, EXPECTED[:3]), dtype="float32", expected=EXPECTED)
    with pytest.raises(RuntimeError, match=rf"{TRL}: loss 0\.704442 at step 2, where 0\.704426"):
        check_losses(found(ours, ours[:3]), dtype="float32", expected=EXPECTED)
    with pytest.raises(RuntimeError, match=rf"{DPO}: loss 0\.693247 at step 1"):
        check_losses(found((EXPECTED[0] + 1e-4,), EXPECTED[:1]), dtype="float32", expected=None)
    with pytest.raises(RuntimeError, match=r"where 0\.704426 is expected"):
        check_losses(found((EXPECTED[0], 0.7), (EXPECTED[0], 0.7)), dtype="float32", expected=EXPECTED)


def test_claims_of_a_step_compare_time_and_memory_with_both_settings_of_the_peer() -> None:
    reported = [{"step_s": 1.0, "extra_mib": 10.0}]
    found = dict.fromkeys(("ctpd: DPO", "ctpd: CTPD"), reported) | {
        TRL: [{"step_s": 4.0, "extra_mib": 40.0}],
        PRECOMPUTED: [{"step_s": 2.0, "extra_mib": 20.0}],
    }
    claims = {claim.text: claim for claim in claims_of(SCENARIOS["default"], found)}
    assert len(claims) == 8
    precomputed = claims["default shape: CTPD time / TRL's precomputed DPO time"]
    shipped = claims["default shape: CTPD time / TRL's DPO time"]
    assert (precomputed.median, precomputed.target, precomputed.met) == (0.5, 0.45, False)
    assert (shipped.median, shipped.target, shipped.met) == (0.25, 0.35, True)


def test_results_name_what_was_measured_and_the_summary_holds_every_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["/somewhere/step.py", "--rounds", "2", "--to", str(tmp_path), "--data", "/a/b.jsonl"]
    )
    args = Namespace(device="cpu", dtype="float32", threads=2, to=tmp_path, quick=False)
    claims = [Claim("fast", "at most", 0.5, [0.4, 0.6, 0.45]), Claim("small", "at most", 0.3, [0.4])]
    figure = bars([Bar("a", [1.0, 2.0], 1.5)], title="t", unit="s")
    result = Result(
        name="step",
        title="A step",
        text=["words"],
        claims=claims,
        figures={"x.svg": figure},
        tables=[Table("numbers", ("a", "b"), [[1, 2.0]])],
        measurements={"k": [1]},
    )
    folder = write(result, args)
    write(Result(name="head", title="The head", text=[], claims=[Claim("record", "at most", None, [2.0])]), args)
    record = json.loads((folder / "step.json").read_text())
    assert record["command"] == "python -m benchmarks.step --rounds 2 --data b.jsonl"
    assert [claim["met"] for claim in record["claims"]] == [True, False]
    assert str(tmp_path) not in (folder / "step.json").read_text() + (folder / "step.md").read_text()
    page = (folder / "step.md").read_text()
    assert "CPU figures: " in page
    assert "| 1 | 2 |" in page
    summary = (tmp_path / "README.md").read_text()
    assert "| [step](step/step.md) | fast | at most 0.5 | 0.45 (0.4 to 0.6) | 3 | yes |" in summary
    assert "| [step](step/step.md) | small | at most 0.3 | 0.4 | 1 | **no** |" in summary
    assert "| [head](head/head.md) | record |  | 2 | 1 | not judged |" in summary


def test_reduced_shapes_are_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["head.py", "--quick"])
    args = Namespace(device="cpu", dtype="float32", threads=2, to=tmp_path, quick=True)
    write(Result(name="head", title="The head", text=[], claims=[Claim("fast", "at most", 0.5, [2.0])]), args)
    (claim,) = json.loads((tmp_path / "head" / "head.json").read_text())["claims"]
    assert claim_row(claim)[-1] == "not judged"


def test_products_of_a_step_are_six_flops_a_weight_and_token_and_eight_in_the_head() -> None:
    shape = Shape(hidden=64, layers=3, heads=4, vocab=1000)
    found = products(shape, sequences=4, length=32, scored=96, tile=(24, 250))
    linear = sum(p.flops for p in found if not p.name.startswith(("attention scores", "attention values", "head")))
    attention = sum(p.flops for p in found if p.name.startswith(("attention scores", "attention values")))
    head = sum(p.flops for p in found if p.name.startswith("head"))
    assert linear == 6 * 4 * 32 * shape.layers * (4 + 12) * 64 * 64
    assert attention == 7 * 2 * 4 * 32 * 32 * 64 * shape.layers / 2
    assert head == 8 * 96 * 64 * 1000
    assert Product("", 2, 3, 4, 5).flops == 2 * 2 * 3 * 4 * 5


def test_exponent_is_the_slope_of_a_power() -> None:
    assert exponent([(x, 3 * x**1.5) for x in (1.0, 2.0, 8.0)]) == pytest.approx(1.5)


def test_bound_of_sharing_is_a_tenth_above_the_tokens_left() -> None:
    assert [bound(share) for share in (0.0, 0.5)] == pytest.approx([1.1, 0.825])
    assert with_prompt(TINY, 0.0).prompt_len == 1
    assert with_prompt(TINY, 0.75).prompt_len == 18


def test_stages_are_grouped_and_passes_counted_by_model_and_pairs() -> None:
    manifests = [
        {"stage": kind, "provenance": {"seconds": s}} for kind, s in (("train", 2), ("train", 3), ("pairs", 1))
    ]
    assert stage_seconds(manifests) == {"train": [2.0, 3.0], "pairs": [1.0]}
    model, pairs = SimpleNamespace(key="m" * 32), SimpleNamespace(key="p" * 32)
    once = SimpleNamespace(kind="signals", label="teacher", inputs={"model": model, "pairs": pairs}, external={})
    again = SimpleNamespace(kind="distributions", label="teacher", inputs={"model": model, "pairs": pairs}, external={})
    other = SimpleNamespace(kind="signals", label="hub model", inputs={"pairs": pairs}, external={"model": "x@1"})
    unrelated = SimpleNamespace(kind="train", label="t", inputs={}, external={})
    assert sorted(passes([once, again, other, unrelated]).values()) == [1, 2]


def test_figures_say_their_numbers_and_refuse_what_cannot_be_drawn() -> None:
    svg = log_lines([Line("ours", [(1, 2), (4, 8)])], title="<t>", x_label="x", y_label="s")
    assert "ours: 1 2, 4 8" in svg
    assert "&lt;t&gt;" in svg
    with pytest.raises(ValueError, match="points above 0"):
        log_lines([Line("ours", [(0, 2)])], title="", x_label="", y_label="")
    with pytest.raises(ValueError, match="nothing to draw"):
        bars([], title="", unit="")


def test_peak_memory_begins_anew_and_sees_what_is_gone_again() -> None:
    reset_peak()
    before = resident_mib()
    block = mmap.mmap(-1, 64 * 2**20)  # of malloc it could be memory that is resident already
    np.frombuffer(block, dtype=np.uint8).fill(1)
    block.close()
    assert peak_mib() - before > 50
    reset_peak()
    assert peak_mib() - before < 50
    assert math.isfinite(machine_seconds())


def test_make_bench_runs_every_benchmark_there_is() -> None:
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    named = next(line for line in makefile.splitlines() if line.startswith("BENCHMARKS := ")).split()[2:]
    scripts = {path.stem for path in (BENCHMARKS).glob("*.py") if "def main() -> None:" in path.read_text()}
    assert sorted(named) == sorted(scripts)
    for name in named:
        assert importlib.import_module(f"benchmarks.{name}").main
