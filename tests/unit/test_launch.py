"""How one command becomes several processes, and how their errors come back."""

import os
from pathlib import Path

import pytest

from ctpd.app import Experiment
from ctpd.cli import launch
from ctpd.cli.launch import LaunchError, processes_to_start, run_launched
from ctpd.core.errors import UserError
from ctpd.core.processes import processes
from ctpd.pipeline.graph import Graph
from ctpd.pipeline.runtime import Runtime
from ctpd.recipe import LaunchSpec, load_recipe, shipped_recipes
from ctpd.train.config import FsdpSpec

EIGHT = LaunchSpec(num_processes=8)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("spec", "flag", "world", "expected"),
    [(LaunchSpec(), None, None, 1), (EIGHT, None, None, 8), (EIGHT, 2, None, 2), (EIGHT, 1, None, 1), (EIGHT, None, 2, 1),
     (LaunchSpec(), 2, 2, 1), (EIGHT, None, 1, 1)],
)  # fmt: skip
def test_the_flag_comes_before_the_recipe_and_a_launcher_before_both(
    spec: LaunchSpec, flag: int | None, world: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", "0")
    assert processes_to_start(spec, num_processes=flag, jobs=1) == expected


@pytest.mark.parametrize(
    ("spec", "flag", "jobs", "world", "text"),
    [
        (
            LaunchSpec(),
            2,
            2,
            None,
            "`--num-processes` asks for 2 .*Leave `--jobs` out, or give it with `--num-processes 1`",
        ),
        (EIGHT, None, 2, None, "the recipe's `launch` block asks for 8 .*`--num-processes 1`"),
        (LaunchSpec(), None, 2, 4, "a launcher asks for 4 .*Leave `--jobs` out[.]"),
        (LaunchSpec(), 2, 1, 4, "`--num-processes 2` contradicts the launcher, which has started 4"),
    ],
)
def test_flags_that_contradict_each_other_or_the_launcher_are_refused(
    spec: LaunchSpec, flag: int | None, jobs: int, world: int | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=text):
        processes_to_start(spec, num_processes=flag, jobs=jobs)


def test_a_helper_builds_for_the_same_command_and_prints_nothing() -> None:
    argv = ["run", "mine.yaml", "--jobs", "3", "--rebuild", "--device=auto", "--only", "CTPD", "--json"]
    assert launch._helping(argv, device="cuda:1") == [
        "eval",
        "--quiet",
        "--device",
        "cuda:1",
        "--num-processes",
        "1",
        "mine.yaml",
        "--only",
        "CTPD",
    ]
    assert launch._helping(["train", "mine.yaml", "--jobs=2"], device="cpu")[0] == "train"


def test_the_first_error_of_a_launch_comes_back_in_its_own_words_and_the_environment_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    argv = ["export", "abc", "--to", str(tmp_path / "to"), "--store", str(tmp_path)]
    with pytest.raises(LaunchError, match=r"^no artifact in .* begins with 'abc'") as found:
        run_launched(argv, count=2, device="cpu")
    assert found.value.exit_code == 2
    assert capfd.readouterr() == ("", "")
    assert {k: v for k, v in os.environ.items() if k in before} == before


def test_the_launch_block_is_in_no_key_and_reaches_the_builders_only_where_there_are_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.yaml"
    text = shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8")
    path.write_text(text + "\nlaunch: {num_processes: 4, fsdp: {wrap: [LlamaDecoderLayer], offload: true}}\n")
    recipe = load_recipe(path)
    fsdp = FsdpSpec(wrap=("LlamaDecoderLayer",), offload=True)
    assert recipe.launch == LaunchSpec(num_processes=4, fsdp=fsdp)
    keys = [[stage.key for stage in Graph(Experiment(r).records).stages] for r in (path, "testbed-smoke")]
    assert keys[0] == keys[1]
    assert Runtime.of(recipe.launch).fsdp is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert Runtime.of(recipe.launch, device="cpu") == Runtime(device="cpu", fsdp=fsdp)


@pytest.mark.parametrize("block", ["{num_processes: 0}", "{num_processes: 2, fsdp: true}", "{fsdp: {layers: []}}"])
def test_a_wrong_launch_block_is_refused(block: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(shipped_recipes()["testbed-smoke"].read_text(encoding="utf-8") + f"\nlaunch: {block}\n")
    with pytest.raises(UserError, match=r"launch\."):
        load_recipe(path)


def test_a_helper_sees_one_gpu_of_those_that_this_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch._only_gpu(None) == {}
    assert launch._only_gpu(2) == {"CUDA_VISIBLE_DEVICES": "2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert launch._only_gpu(2) == {"CUDA_VISIBLE_DEVICES": "7"}


def test_an_environment_that_does_not_say_which_process_this_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every process would act as rank 0, and write files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE=2 and no RANK"):
        processes()
