"""`samed plan`: a table with reasons, a file that can be read again, and one message for what cannot be planned."""

import pytest
from conftest import write_balls
from scan_files import two_modalities

from samed_peft.cli import main
from samed_peft.datasets import open_folder, take_fingerprint
from samed_peft.training import read_plan
from samed_peft.training.decisions import RULES


@pytest.fixture(scope="module")
def balls(tmp_path_factory):
    root = tmp_path_factory.mktemp("balls") / "data"
    write_balls(root)
    return root


def _plan(*options):
    """Exit code of `samed plan`."""
    try:
        main(["plan", *map(str, options)])
    except SystemExit as end:
        return end.code
    return 0


def test_the_plan_is_printed_with_reasons_and_written(balls, tmp_path, capsys):
    options = ("--base", "tiny-sam", "--max_minutes", 2, "--output", tmp_path / "new" / "plan.json")
    assert _plan(balls, "--patient_pattern", "(p.)_.", *options) == 0
    printed = capsys.readouterr().out
    plan = read_plan(tmp_path / "new" / "plan.json")
    for decision in plan.decisions:
        assert decision.name in RULES
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{decision.name} ")]
        assert line.endswith(decision.reason)
    assert printed.startswith(
        "data: 4 cases of 3 patients, MR; 24 slices, 12 of them labelled, typically 24 x 20; classes: ball\n"
    )
    assert (plan.values["plane"], plan.values["folds"], plan.values["max_minutes"]) == ("axial", 3, 2.0)
    plan.require_data(take_fingerprint(open_folder(balls), patient_pattern="(p.)_."))


def test_published_bases_are_planned_without_their_weights(balls, capsys):
    assert _plan(balls, "--plane", "coronal", "--class_names", "sphere") == 0
    printed = capsys.readouterr().out
    assert "base: facebook/sam-vit-base, trained at 1024 pixels" in printed
    assert "as given, in place of the plan's" in next(x for x in printed.splitlines() if x.startswith("plane "))
    assert "sphere is in" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max_minutes", "0.00001"), "expected time for one step at least, found 1e-05 minutes"),
        (("--max_minutes", "nan"), "max_minutes must be a positive number of minutes; found nan"),
        (("--seconds_per_step", "-1"), "seconds_per_step must be a positive number of seconds; found -1.0"),
        (("--base", "nowhere/at/all"), "is neither a file, nor a folder, nor a Hub id"),
        (("--channel", "T9"), "expected one of the channels 0 (T1)"),
        (("--class_names", "a,b"), "expected 1 class name, as many as dataset.json has"),
        (("--output", "data"), "expected a file name, found the folder data"),
    ],
)
def test_wrong_input_ends_with_code_2_and_one_message(balls, capsys, monkeypatch, options, message):
    monkeypatch.chdir(balls.parent)
    assert _plan(balls, "--base", "tiny-sam", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1


def test_all_of_two_channels_are_planned_or_those_that_are_named(tmp_path, capsys):
    data = two_modalities(tmp_path / "data", in_4d=False)
    assert _plan(data, "--base", "tiny-sam") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("channels ")]
    assert line.split()[:4] == ["channels", "0", "1", "T1"]
    assert _plan(data, "--base", "tiny-sam", "--channel", "FLAIR", "T1") == 0
    assert "FLAIR and T1 in the encoder's three channels" in capsys.readouterr().out
    assert _plan(data, "--base", "tiny-sam", "--channel", "1") == 0
    assert "\nchannels " not in capsys.readouterr().out
    assert _plan(data, "--base", "tiny-sam", "--channel", "T2") == 2
    assert "0 (T1), 1 (FLAIR)" in capsys.readouterr().err
