"""Rules about the structure of the program, checked on its source."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

import ctpd
from ctpd.cli.main import COMMANDS, SUMMARIES, cli
from ctpd.objectives.base import Objective
from ctpd.pipeline.methods import METHODS
from ctpd.recipe import load_recipe, shipped_recipes
from ctpd.train.config import Schedule

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for top in ("ctpd", "baselines", "harness", "benchmarks", "scripts") for path in (ROOT / top).rglob("*.py")
)

PUBLIC = {
    "AlignedSpans", "DistillationObjective", "Objective", "PairObjective", "PreferenceTrainer", "RowObjective",
    "UserError", "align_spans", "load_recipe", "plan", "run", "score", "span_weights",
}  # fmt: skip
RUNNING = {
    "--store", "--device", "--num-processes", "--jobs", "--offline", "--only", "--seed", "--limit", "--plan", "--rebuild", "--report-to", "--log-dir",
    "--quiet", "--json", "--debug",
}  # fmt: skip
OPTIONS = {
    "run": RUNNING | {"--samples", "--from-record"},
    "rehearse": {"--store", "--set", "--keep", "--device", "--offline", "--quiet", "--json", "--debug"},
    "train": RUNNING - {"--limit"},
    "eval": RUNNING
    | {"--samples", "--model", "--suite", "--data-root", "--precision", "--batch-size", "--chat-template"}
    | {"--template-variable", "--think-end-token"},
    "compare": {"--store", "--only", "--seed", "--limit", "--json", "--debug", "--format", "--to", "--published"},
    "recipes": {"--json", "--schema", "--show", "--copy", "--to", "--debug"},
    "help": {"--json", "--debug"},
    "init": {"--teacher", "--student", "--data", "--column", "--encoding", "--to", "--debug"},
    "inspect spans": {"--data", "--text", "--limit", "--show", "--html", "--offline", "--json", "--debug"},
    "inspect tokenizers": {"--data", "--text", "--limit", "--offline", "--json", "--debug"},
    "inspect pairs": {"--store", "--show", "--offline", "--json", "--debug"},
    "inspect template": {
        *("--data", "--limit", "--variable", "--merge-system", "--end-token"),
        *("--store", "--offline", "--json", "--debug"),
    },
    "inspect weights": {"--store", "--only", "--seed", "--json", "--debug"},
    "export": {"--to", "--merge", "--with-base", "--dtype", "--store", "--debug"},
    "store du": {"--store", "--json", "--debug"},
    "store rm": {"--store", "--debug"},
    "store gc": {"--store", "--dry-run", "--debug"},
    "doctor": {"--deterministic", "--json", "--debug"},
}


def test_public_names_are_these_and_all_can_be_imported() -> None:
    assert set(ctpd.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(ctpd, name).__name__
        assert name in dir(ctpd)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ctpd.no_such_name  # type: ignore[attr-defined]


def options(command: click.Command, name: str = "") -> Iterator[tuple[str, set[str]]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from options(found, f"{name} {child}".strip())
    else:
        yield name, {opt for p in command.params if isinstance(p, click.Option) for opt in p.opts}


def test_command_line_has_these_options_and_no_hyperparameter() -> None:
    assert dict(options(cli)) == OPTIONS
    given = {opt.lstrip("-").replace("-", "_") for opts in OPTIONS.values() for opt in opts}
    assert not given & {*Schedule.model_fields, "learning_rate", "beta"}


def test_every_option_is_explained_and_every_command_summarised() -> None:
    assert set(SUMMARIES) == set(COMMANDS)
    for name, _ in options(cli):
        command: click.Command = cli
        for part in name.split():
            assert isinstance(command, click.Group)
            found = command.get_command(click.Context(command), part)
            assert found is not None
            command = found
        assert command.help, name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_an_objective_with_defaults(method: str) -> None:
    module, _, name = METHODS[method].partition(":")
    cls = getattr(importlib.import_module(module), name)
    assert issubclass(cls, Objective)
    assert cls(cls.params_type()).layout


def test_every_method_is_in_a_shipped_recipe() -> None:
    used = {run.method for name in shipped_recipes() for run in load_recipe(name).runs.values()}
    assert used | {"sft"} == set(METHODS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    tree = ast.parse(text)
    assert ast.get_docstring(tree)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The named parameters without `self` and `cls`; 0 for a command of click, whose parameters are its options, and for a
    kernel, which gets its pointers one by one.
    """
    if any(re.search(r"\b(command|triton\.jit)\b", ast.unparse(decorator)) for decorator in function.decorator_list):
        return 0
    arguments = function.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_have_at_most_60_lines_and_6_parameters(path: Path) -> None:
    found = list(functions(ast.parse(path.read_text(encoding="utf-8"))))
    assert [f.name for f in found if f.end_lineno is None or f.end_lineno - f.lineno + 1 > 60] == []
    assert [f.name for f in found if num_parameters(f) > 6] == []


def test_parameters_are_counted_without_self_and_not_for_commands_and_kernels() -> None:
    """The test above can fail."""
    source = "def f(self, a, /, b, *c, d, e=1, **g): ...\n@cli.command()\n@option\ndef h(i, j): ...\n@triton.jit\ndef k(l): ...\n"
    assert [num_parameters(function) for function in functions(ast.parse(source))] == [4, 0, 0]


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_what_tests_share_is_in_fixtures() -> None:
    """No module of tests imports another: its tests would be collected, and run, twice."""
    importing = {
        str(path.relative_to(ROOT)): name
        for path in (ROOT / "tests").rglob("*.py")
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if re.fullmatch(r"tests\..*\btest_\w+", name)
    }
    assert not importing


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_loads_no_code_from_data(path: Path) -> None:
    """No pickle, no code of a model's author, no evaluation of text."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.count("trust_remote_code") == text.count("trust_remote_code=False")
    assert not {name.split(".")[0] for name in imported(tree)} & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"eval", "exec"}
    loads = [
        n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) in ("torch.load", "torch.save")
    ]
    assert not loads


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_branch_asks_for_the_name_of_a_method(path: Path) -> None:
    compared = {
        constant.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare | ast.match_case)
        for constant in ast.walk(node.pattern if isinstance(node, ast.match_case) else node)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }
    # `spec.sft == "skip"` and the like are settings; a role's `sft` is an attribute and no comparison.
    assert not compared & set(METHODS)


HEAVY = ("torch", "transformers", "lm_eval", "datasets", "peft", "pandas", "scipy")


@pytest.mark.parametrize(
    "code",
    [
        "import ctpd, ctpd.cli.main",
        "import ctpd.recipe, ctpd.testbed.config, ctpd.train.config, ctpd.core.store, ctpd.text.prepare, ctpd.text.render",
        "from ctpd.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from ctpd.cli.main import main\nmain(['recipes'])",
        "from ctpd.cli.main import main\nmain(['recipes', '--show', 'testbed'])",
        "from ctpd.cli.main import main\nmain(['help', 'ctpd.mu'])",
    ],
    ids=["import", "core and text", "help", "recipes", "one recipe", "a key"],
)
def test_light_commands_load_nothing_heavy(code: str) -> None:
    code += f"\nimport sys\nprint('loaded', sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_a_plan_of_models_that_the_recipe_makes_itself_loads_no_library_of_models(tmp_path: Path) -> None:
    """torch describes shapes and types of stages; transformers and the like take seconds, and are for ready-made models."""
    code = (
        f"from ctpd.cli.main import main\ntry: main(['run', 'testbed-smoke', '--plan', '--store', {str(tmp_path)!r}])\n"
    )
    code += "except SystemExit: pass\nimport sys\n"
    code += f"print('loaded', sorted(set(sys.modules) & set({HEAVY!r}) - {{'torch'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_dependencies_point_one_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The contracts of import-linter in pyproject.toml."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS, capsys.readouterr().out
