"""Tables from records alone: numbers, ranks, differences, what is missing or partial, formats, and refusals."""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctpd.core.errors import UserError
from harness import latex
from harness.formats import (
    FORMATS,
    frame,
    json_rows,
    to_csv,
    to_html,
    to_latex,
    to_markdown,
    to_text,
    write_table,
)
from harness.published import PUBLISHED, load_published
from harness.sheet import TableSpec
from harness.suites import suite_names
from harness.tables import build_tables
from tests.fixtures.records import MAIN, build, changed, record, remeasured, result, study
from tests.fixtures.waiting import HANGS


def test_cells_are_means_over_seeds_with_their_standard_deviation() -> None:
    table = build(study())
    assert table.columns == ("GSM8K", "Wino")
    _, dpo, ctpd = table.rows
    assert [cell and cell.mean for cell in dpo.cells] == pytest.approx([0.375, 0.5, 0.4375])
    assert [cell and cell.spread for cell in dpo.cells] == pytest.approx([0.125 * 2**0.5, 0.0, 0.0625 * 2**0.5])
    assert [cell and cell.mean for cell in ctpd.cells] == pytest.approx([0.625, 0.5, 0.5625])


def test_best_and_second_are_ranked_without_the_unranked_rows_and_equal_scores_share_a_rank() -> None:
    ranks = {row.run: [cell and cell.rank for cell in row.cells] for row in build(study()).rows}
    assert ranks == {"teacher": [None] * 3, "dpo": [2, None, 2], "ctpd": [1, None, 1]}


def test_difference_is_paired_by_document_and_averaged_over_seeds_and_columns() -> None:
    teacher, dpo, ctpd = build(study()).rows
    assert dpo.difference is None
    assert ctpd.difference is not None
    assert ctpd.differences is not None
    assert ctpd.difference.value == pytest.approx(0.5625 - 0.4375)
    assert ctpd.differences["GSM8K"].value == pytest.approx(0.25)
    assert ctpd.paired_seeds == (0, 1)
    # per document, over seeds: GSM8K [0, .5, .5, 0], Wino [0, 0]. A bootstrap mean lies in [0, .5] / 2 columns.
    assert ctpd.given_seeds is not None
    assert (ctpd.given_seeds.low, ctpd.given_seeds.high) == pytest.approx((0.0, 0.25), abs=0.07)
    # over seeds: .25 on seed 0 and 0 on seed 1, and t of one degree of freedom is 12.7
    assert ctpd.difference.high - ctpd.difference.low == pytest.approx(2 * 12.7 * 0.125, rel=0.1)
    assert teacher.difference is not None
    assert teacher.difference.value == pytest.approx(1 - 0.4375)


def test_an_interval_is_the_same_whatever_other_rows_stand_in_the_table() -> None:
    alone = TableSpec(name="two", caption="Two", rows=(("CTPD", "ctpd"), ("DPO", "dpo")), base="dpo")
    assert build(study(), alone).rows[0].difference == pytest.approx(build(study()).rows[2].difference)


def test_html_is_one_escaped_page_with_the_best_and_the_second_marked() -> None:
    spec = TableSpec(
        name="main",
        caption="<b>Main</b>",
        rows=(("Teacher", "teacher"), ("<DPO>", "dpo"), ("CTPD", "ctpd")),
        base="dpo",
        unranked=("teacher",),
        note="Run `ctpd run a`.",
    )
    page = to_html(build(study(), spec))
    assert "&lt;b&gt;Main&lt;/b&gt;" in page
    assert '<th scope="row">&lt;DPO&gt;</th>' in page
    assert '<td class="best">62.50 ± 17.68</td>' in page
    assert '<td class="second">37.50 ± 17.68</td>' in page
    assert "<li>Run <code>ctpd run a</code>.</li>" in page
    assert "<b>" not in page


def test_a_missing_seed_is_shown_missing_with_the_command_that_brings_it() -> None:
    table = build(study()[:-1])
    assert table.rows[2].missing_seeds == (1,)
    text = to_markdown(table)
    assert "1 of 2" in text
    assert "Missing: CTPD (seed 1). `ctpd compare` names the commands that build them." in text
    assert "over the seeds that both have" in text
    assert table.rows[2].difference is not None
    assert table.rows[2].difference.value == pytest.approx(0.625 - 0.375)  # seed 0 against seed 0


def test_a_run_without_records_is_a_row_of_missing() -> None:
    spec = TableSpec(name="main", caption="Main", rows=(*MAIN.rows, ("KD", "kd")), base="dpo")
    text = to_text(build(study(), spec))
    assert re.search(r"^KD +missing +missing +missing", text, re.MULTILINE)
    assert "Missing: KD (all)." in text


def test_a_base_without_records_leaves_differences_out() -> None:
    table = build([one for one in study() if one.run != "dpo"])
    assert all(row.difference is None for row in table.rows)
    assert "vs." not in to_text(table)


def test_a_seed_that_the_recipe_asks_for_and_no_record_has_is_missing() -> None:
    table = build(study(), seeds=(0, 1, 2))
    assert [row.missing_seeds for row in table.rows] == [(), (2,), (2,)]


def test_a_column_that_one_seed_lacks_is_averaged_over_the_others_and_says_so() -> None:
    *records, last = study()
    records.append(changed(last, evaluation={"GSM8K": last.evaluation["GSM8K"]}))
    table = build(records)
    wino, average = table.rows[2].cells[1:]
    assert wino is not None
    assert average is not None
    assert (wino.num_seeds, average.num_seeds) == (1, 1)
    assert average.mean == pytest.approx((0.75 + 0.5) / 2)
    assert "(1 of 2)" in to_text(table)
    assert "CTPD (some columns)" in to_text(table)


def test_limited_runs_are_marked_partial_everywhere() -> None:
    records = [
        record(run, seed, result("GSM8K", [1, 0], total=1319, limit=2), result("Wino", [1, 0]), partial=True)
        for run, seed in (("teacher", None), ("dpo", 0), ("ctpd", 0))
    ]
    table = build(records)
    assert table.partial == ("GSM8K",)
    assert frame(table)["partial columns"].tolist() == ["GSM8K"] * 3
    for text in (to_markdown(table), to_text(table), to_latex(table), to_html(table)):
        assert "(partial: a part of the documents)" in text
        assert "GSM8K 2 of 1,319" in text
    assert "GSM8K †" in to_markdown(table)


def test_footnotes_name_documents_shots_seeds_versions_and_what_the_interval_is_over() -> None:
    text = " ".join(build(study()).footnotes)
    for needed in (
        "gsm8k v1.0, 4 documents, 5-shot",
        "training seeds (0, 1)",
        "lm-evaluation-harness 0.4.13",
        "95%",
        "over training seeds and documents",
        "Not ranked: Teacher",
        "float32",
        "to DPO",
    ):
        assert needed in text
    single = build([one for one in study() if one.seed in (None, 0)])
    assert any("One training seed (0)" in note for note in single.footnotes)


def test_other_shared_settings_are_refused_and_the_fields_named() -> None:
    records = study()
    records[3] = record("ctpd", 0, shared={"train": {"epochs": 4}})
    with pytest.raises(UserError, match=r"`train\.epochs` \(3 and 4\)"):
        build(records)


@pytest.mark.parametrize(
    ("field", "value"),
    [("task_hash", "other"), ("version", 2.0), ("num_docs", 3), ("dtype", "bfloat16"), ("backend", "vllm"),
     ("shots", 0), ("chat_template", True), ("lm_eval_version", "0.4.14"), ("batch_size", 1)],
)  # fmt: skip
def test_results_under_another_protocol_are_refused_by_column_and_field(field: str, value: object) -> None:
    records = study()
    records[2] = remeasured(records[2], "Wino", **{field: value})
    with pytest.raises(UserError, match=rf"column 'Wino'.*run 'dpo', seed 1.*`{field}`"):
        build(records)


def test_other_documents_under_one_hash_are_refused() -> None:
    records = study()
    first, *others = records[2].evaluation["Wino"].documents
    documents = (first._replace(doc_hash="another document"), *others)
    records[2] = remeasured(records[2], "Wino", documents=documents)
    with pytest.raises(UserError, match=r"column 'Wino'.*`documents`"):
        build(records)


def test_chat_templates_change_prompts_and_so_only_documents_must_agree() -> None:
    records = study()
    for number in range(len(records)):
        for column in ("GSM8K", "Wino"):
            changes = {"chat_template": True, "task_hash": f"prompts of model {number}"}
            records[number] = remeasured(records[number], column, **changes)
    assert "with chat template" in " ".join(build(records).footnotes)


def test_a_record_given_twice_and_an_unknown_base_are_refused() -> None:
    with pytest.raises(UserError, match="two records of run 'dpo', seed 0"):
        build([*study(), study()[1]])
    with pytest.raises(UserError, match=r"the run 'dqo' is no row. Did you mean 'dpo'\?"):
        build(study(), TableSpec(name="main", caption="Main", rows=MAIN.rows, base="dqo"))
    with pytest.raises(UserError, match="no records"):
        build_tables([], [MAIN])


def test_markdown_has_one_line_per_row_bold_best_and_underlined_second() -> None:
    lines = to_markdown(build(study())).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 5
    assert len({line.count("|") for line in table}) == 1
    assert "**62.50 ± 17.68**" in table[4]
    assert "<ins>37.50 ± 17.68</ins>" in table[3]
    assert "+12.50 [" in table[4]


def test_markup_in_labels_is_escaped() -> None:
    spec = TableSpec(name="main", caption="a|b", rows=(("x_y & 100%|*", "ctpd"), ("DPO", "dpo")))
    table = build(study(), spec)
    assert r"x_y & 100%\|\*" in to_markdown(table)
    assert r"x\_y \& 100\%\textbar{}*" in to_latex(table)
    assert r"\texttt{ctpd run a\_b}" in latex.escape("Use `ctpd run a_b`.")


def test_csv_reads_back_as_numbers_in_percent_without_published_ones() -> None:
    table = build(
        study(), TableSpec(name="m", caption="M", rows=MAIN.rows, base="dpo", published="table1_qwen14b_llama8b")
    )
    read = pd.read_csv(io.StringIO(to_csv(table)))
    assert read["row"].tolist() == ["Teacher", "DPO", "CTPD"]
    assert read["Average"].tolist() == [100.0, 43.75, 56.25]
    assert read["difference"].tolist()[1:] == pytest.approx([np.nan, 12.5], nan_ok=True)
    assert "67.42" not in to_csv(table)


@pytest.mark.parametrize("name", sorted(path.stem for path in PUBLISHED.glob("*.csv")))
def test_every_published_table_is_labelled_and_shown_below_ours(name: str) -> None:
    table = build(study(), TableSpec(name="m", caption="M", rows=MAIN.rows, published=name))
    for suffix in ("md", "txt", "tex", "html"):
        ours, label, theirs = FORMATS[suffix](table).partition("Published (arXiv 2601.11865")
        assert label
        assert "Reported by others; not our measurements." in theirs
        assert "67.42" in theirs or "43.26" in theirs
        assert "67.42" not in ours


def test_published_footnotes_are_true_of_the_published_numbers() -> None:
    table = load_published("table1_qwen14b_llama8b")
    rows = {row[0]: [float(value) for value in row[1:]] for row in table.rows}
    assert np.mean(rows["CTPD"][:-1]) == pytest.approx(67.47, abs=0.005)
    assert rows["CTPD"][-1] - rows["TIS-DPO"][-1] == pytest.approx(1.26)
    assert rows["CTPD"][-1] - rows["DPO"][-1] == pytest.approx(1.78)
    smaller = load_published("qwen7b_llama1b")
    for row in smaller.rows:
        *columns, average = map(float, row[1:])
        assert 30.5 < 6 * average - sum(columns) < 32.5
    with pytest.raises(UserError, match="Did you mean 'table1_qwen14b_llama8b'"):
        load_published("table1_qwen14b")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_alone_and_inside_a_paper(tmp_path: Path) -> None:
    rows = (("Teacher", "teacher"), ("DPO_x & 50% #1", "dpo"), ("CTPD {~^<>}", "ctpd"), ("KD", "kd"))
    spec = TableSpec(
        name="main", caption="β → 0.1 & μ", rows=rows, base="dpo", note="a_b", published="table1_qwen14b_llama8b"
    )
    write_table(build(study(), spec), tmp_path, formats=("tex",))
    paper = r"\documentclass{article}\usepackage{booktabs}\begin{document}Before.\input{main}After.\end{document}"
    (tmp_path / "paper.tex").write_text(paper)
    for name in ("main.tex", "paper.tex"):
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", name]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
        assert run.returncode == 0, run.stdout[-2000:]
        assert "incomplete" not in run.stdout
        assert (tmp_path / name).with_suffix(".pdf").stat().st_size > 1000


def test_latex_environments_and_braces_balance_and_rows_have_equal_columns() -> None:
    spec = TableSpec(name="a b", caption="C", rows=MAIN.rows, base="dpo", published="qwen7b_llama1b")
    text = to_latex(build(study(), spec))
    for environment in ("table", "tabular", "minipage"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}")
    for block in re.findall(r"\\begin\{tabular\}\{(l(?:r*))\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in block[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {len(block[0]) - 1}
    assert r"\label{tab:a-b}" in text


def test_write_table_writes_the_formats_asked_for(tmp_path: Path) -> None:
    paths = write_table(build(study()), tmp_path / "tables")
    assert [path.name for path in paths] == ["main.md", "main.csv", "main.tex", "main.html"]
    assert all(path.read_text(encoding="utf-8").strip() for path in paths)


def test_tables_whose_names_differ_in_signs_or_case_keep_files_of_their_own(tmp_path: Path) -> None:
    names = ("mu: 1", "mu: -1", "Main", "main", "../main", "β", "γ", "")
    tables = build_tables(study(), [replace(MAIN, name=name) for name in names])
    paths = [path for table in tables for path in write_table(table, tmp_path, formats=("md",))]
    assert len({path.name.lower() for path in paths}) == len(names) == len(list(tmp_path.iterdir()))


def test_rows_for_json_hold_null_where_nothing_was_measured() -> None:
    rows = json_rows(build(study()[:3]))
    assert rows[2]["GSM8K"] is None
    assert rows[1]["difference"] is None
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_importing_tables_and_formats_loads_neither_torch_nor_lm_eval() -> None:
    """`ctpd compare` is to answer within seconds."""
    code = "import sys, harness.tables, harness.formats; print({'torch', 'lm_eval', 'transformers'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert found.stdout.strip() == "set()"


def test_the_shipped_suites_are_named() -> None:
    assert {"card", "paper"} <= set(suite_names())
