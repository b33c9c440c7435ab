"""What the report says of its rows: their meaning, and a headline that claims no more than the design supports."""

import pytest

from ctpd.ops import weights
from harness.contents import by_run
from harness.headline import Headline, headline
from harness.meanings import STRATEGIES, Meaning, meaning
from harness.record import Design, FrozenModel, Method, Record, SharedSettings, StoredSignal
from harness.sheet import TableSpec
from harness.tables import build_tables
from tests.fixtures.records import changed, demo, record, result

SPACE = "\N{NO-BREAK SPACE}"
ROWS = ("Teacher", "Student", "DPO", "TIS-DPO", "CTPD", "CTPD, student reference")


def told(records: list[Record], *, base: str | None = "DPO") -> Headline:
    rows = tuple((name, name) for name in by_run(records))
    unranked = tuple(one.run for one in records if one.kind == "untrained teacher")
    spec = TableSpec("main", "Main", rows, base=base, unranked=unranked)
    return headline(build_tables(records, [spec])[0], by_run(records))


def scored(run: str, *scores: float, seed: int | None = 0, **fields: object) -> Record:
    return record(run, seed, result("A", scores), **{"kind": "trained", **fields})


def test_the_headline_of_a_real_run_names_seed_families_and_rows_below_their_start() -> None:
    found = told(demo(ROWS))
    assert found.result[0] == f"Best Average: CTPD, student reference, 73.28{SPACE}%."
    assert found.limits == [
        f"Only differences to DPO are tested, and not whether CTPD, student reference is better than CTPD (69.40{SPACE}%).",
        "One training seed (0): this compares the models as trained; another seed could order them otherwise.",
        "Trained rows: preference optimisation (DPO and TIS-DPO); preference distillation (CTPD and CTPD, student "
        "reference).",
        "Not compared here: distillation (imitates the teacher, without comparing two responses).",
        "Below the model that they started from: DPO, TIS-DPO.",
    ]


def test_an_interval_that_holds_zero_is_no_clear_difference() -> None:
    found = told([scored("DPO", 0, 1, 0, 1), scored("New", 1, 0, 1, 1)])
    assert found.result[-1] == "That is no clear difference: the interval holds zero."
    clear = told([scored("DPO", 0, 0, 0, 0), scored("New", 1, 1, 1, 1)])
    assert not any("no clear" in text for text in clear.result)


def test_several_seeds_are_said_and_one_seed_has_no_p_value() -> None:
    records = [scored(run, *values, seed=seed) for seed in range(3) for run, values in RUNS.items()]
    assert "Means over 3 training seeds." in told(records).limits
    assert "after Holm's correction" in told(records).result[1]
    (one,) = [text for text in told(records[:2]).result if text.startswith("Difference")]
    assert one.endswith("of one seed: another training could move it further.")


RUNS = {"DPO": (0.0, 0.0, 1.0, 0.0), "New": (1.0, 1.0, 1.0, 0.0)}


def test_no_row_is_below_a_start_that_the_table_does_not_have() -> None:
    student = record("Student", None, result("A", [1, 1]), kind="untrained student")
    assert not any("Below" in text for text in told([scored("DPO", 0, 0)], base=None).limits)
    assert any(
        text == "Below the model that they started from: DPO."
        for text in told([student, scored("DPO", 0, 0)], base=None).limits
    )


def test_many_rows_of_a_family_are_counted() -> None:
    rows = [scored(f"r{i}", 1, 0, design=design(), signals=(signal(),)) for i in range(6)]
    assert "preference optimisation (r0, r1, r2 and 3 more)" in told(rows, base=None).limits[1]


def design(**fields: object) -> Design:
    given = {"sides": ("chosen", "rejected"), "granularity": "spans", "reference": "student", "weights": None}
    return Design.model_validate(given | fields)


def signal(role: str = "student", kept: str = "log probabilities") -> StoredSignal:
    return StoredSignal.model_validate({"role": role, "model": "reference", "kept": kept})


def of(**fields: object) -> Meaning:
    return meaning(scored("row", 1.0, **fields))


def test_the_meaning_of_a_row_is_read_from_what_its_objective_declares() -> None:
    teacher = FrozenModel(role="teacher", model="reference")
    ctpd = of(design=design(reference="teacher", weights="teacher"), signals=(signal("teacher"),))
    assert ctpd[1:] == (
        "preference distillation",
        "the student after SFT",
        "chosen and rejected responses",
        "the teacher after SFT",
        "from the teacher's contrastive pair, for each span",
    )
    alone = design(sides=("chosen",), reference=None)
    assert of(design=alone, in_memory=(teacher,))[1:] == (
        "distillation",
        "the student after SFT",
        "chosen responses, the teacher's whole distributions (in memory)",
        "–",
        "–",
    )
    assert of(design=alone).family == "supervised fine-tuning"
    stored = of(design=alone, signals=(signal("teacher", "distributions"), signal("teacher", "responses")))
    assert (
        stored.learns
        == "chosen responses, responses that the teacher generated, the teacher's likeliest tokens (stored)"
    )
    given = SharedSettings(settings={"student": {"sft": "skip"}}, digest="d")
    assert of(design=design(), shared=given.settings).start == "the student as given"
    assert meaning(demo(["Student"])[0]).start == "every trained row starts from it"


@pytest.mark.parametrize("run", ROWS[2:])
def test_older_records_show_the_same_by_their_signals(run: str) -> None:
    """The records of the demo were made before records had a design."""
    (one,) = demo([run])
    assert one.design is None
    whole = Design(
        sides=("chosen", "rejected"),
        granularity="tokens" if run == "TIS-DPO" else "spans",
        reference="teacher" if run == "CTPD" else "student",
        weights={"DPO": None, "TIS-DPO": "student"}.get(run, "teacher"),
    )
    assert meaning(changed(one, design=whole)) == meaning(one)


def test_an_older_record_that_does_not_say_has_no_family() -> None:
    assert of(design=None, method=Method(name="x", params={}, tuned={})).family is None


def test_every_weight_strategy_has_words() -> None:
    assert set(STRATEGIES) == set(weights.STRATEGIES)
