"""Presets hold what was published, and README shows the same."""

from pathlib import Path

import pytest

from samed_peft.config.presets import PRESETS

README = Path(__file__).parents[2] / "README.md"


def test_presets_are_the_published_ones():
    samed, small, huge = (PRESETS[name].options for name in ("samed", "samed_s", "samed_h"))
    assert (samed["epochs"], samed["stop_epoch"], samed["decay_power"], samed["batch_size"]) == (200, 160, 0.9, 24)
    assert samed["mixed_precision"] is None
    assert {key for key in samed if samed[key] != small[key]} == {"decoder"}
    differing = {key: huge[key] for key in samed if samed[key] != huge[key]}
    assert differing == {
        "base": "facebook/sam-vit-huge",
        "epochs": 400,
        "stop_epoch": 300,
        "decay_power": 7.0,
        "mixed_precision": "fp16",
    }


@pytest.mark.parametrize(("preset", "row"), [("samed", "SAMed (ViT-B"), ("samed_s", "SAMed_s"), ("samed_h", "SAMed_h")])
def test_readme_shows_the_published_scores(preset, row):
    line = next(x for x in README.read_text(encoding="utf-8").splitlines() if x.startswith(f"| {row}"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    published = PRESETS[preset]
    scores = [published.dice["mean"], published.hd95, *list(published.dice.values())[1:]]
    assert [float(cell) for cell in cells if cell] == scores
    organs = [score for organ, score in published.dice.items() if organ != "mean"]
    assert not organs or sum(organs) / 8 == pytest.approx(published.dice["mean"], abs=0.01)
