"""The package as a whole: public names, layers, and documents that keep what they promise."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import samed_peft
from samed_peft.config import SamedConfig, TrainingConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def _recipe_options(text):
    """The `--options` given to the recipe in each command of `text`, those of its launcher left out."""
    commands = text.replace("\\\n", " ").splitlines()
    return {o for c in commands if "recipes/synapse.py" in c for o in re.findall(r"--\w+", c.split("synapse.py", 1)[1])}


def _defined_options(recipe):
    """Options that a source adds one by one."""
    calls = [node for node in ast.walk(ast.parse(recipe)) if isinstance(node, ast.Call)]
    adding = [call for call in calls if ast.unparse(call.func) in ("add", "parser.add_argument")]
    return {ast.literal_eval(call.args[0]) for call in adding if isinstance(call.args[0], ast.Constant)}


@pytest.mark.parametrize("name", samed_peft.__all__)
def test_public_names_are_there(name):
    assert name in dir(samed_peft)
    assert getattr(samed_peft, name) is not None


def test_public_names_of_the_contract():
    adapting = {"SamedConfig", "TrainingConfig", "load_sam", "add_lora", "save_adapter", "load_adapter", "push_to_hub"}
    segmenting = {"Volume", "read_volume", "write_mask", "predict_volume", "evaluate_cases", "Report"}
    assert adapting | segmenting | {"dice_ce_loss", "metrics", "datasets"} <= set(samed_peft.__all__)
    assert callable(samed_peft.metrics.score_masks)
    assert callable(samed_peft.datasets.load_synapse)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="samed_peft attribute load_sams"):
        samed_peft.load_sams  # noqa: B018
    with pytest.raises(ImportError, match="load_sams"):
        from samed_peft import load_sams  # noqa: F401


def test_importing_the_package_loads_nothing_else():
    code = "import sys; before = set(sys.modules); import samed_peft; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    ).stdout
    assert "samed_peft" in loaded.split()
    assert not {"torch", "numpy", "transformers", "datasets", "samed_peft.config"} & set(loaded.split())


def test_version_is_that_of_the_project():
    assert (
        samed_peft.__version__
        == tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    )


def test_each_layer_imports_from_below_only():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [block.strip() for _, block in BLOCKS if "pytest" in block]
    assert "\n" not in command
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace(" || exit\n", "\n").splitlines()


def test_the_changelog_says_what_is_unreleased():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased = changelog.split("## Unreleased\n", 1)[1].split("\n## ", 1)[0]
    assert re.search(r"^- ", unreleased, flags=re.MULTILINE)


def test_options_in_the_readme_exist():
    sources = ("recipes/synapse.py", "recipes/finetune.py", "samed_peft/config/options.py")
    recipes = [(ROOT / name).read_text(encoding="utf-8") for name in sources]
    fields = {field.name for kind in (TrainingConfig, SamedConfig) for field in dataclasses.fields(kind)}
    known = set().union(*map(_defined_options, recipes)) | {f"--{name}" for name in fields}
    in_commands = set().union(*(_recipe_options(block) for _, block in BLOCKS))
    assert {"--demo", "--data_dir", "--output_dir"} <= in_commands
    assert in_commands <= known
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`(--[^`]+)`", prose)
    assert {option for span in spans for option in re.findall(r"--\w+", span)} <= known | {"--help"}


def test_python_in_the_readme_uses_names_that_exist():
    code = [block for language, block in BLOCKS if language == "python"]
    assert code
    for node in (node for block in code for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            assert {alias.name for alias in node.names} <= set(vars(importlib.import_module(node.module))["__all__"])


def test_each_hazard_is_held_by_tests_that_exist():
    table = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| what"))]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)`: (\w+(?:, \w+)*)", row.split(" | ")[-1])
        assert named, row
        for file, names in named:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            missing = [name for name in names.split(", ") if f"def test_{name}(" not in text]
            assert not missing, f"{file} lacks {missing}"
