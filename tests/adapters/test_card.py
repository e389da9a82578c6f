import math

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from samed_peft.adapters.card import model_card
from samed_peft.config import SYNAPSE_CLASSES, SamedConfig, is_hub_id
from samed_peft.evaluation import Report


def _config(base="facebook/sam-vit-base", **changes):
    return SamedConfig(base=base, class_names=SYNAPSE_CLASSES, **changes)


def _front_matter(card):
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def _report(hd95=4.5, dataset="Synapse test"):
    """Means of four cases, one of which has no liver."""
    scores, ends = {"dice": 0.81884, "hd95": hd95}, {"dice": [0.8, 0.9], "hd95": [None, None]}
    counts = {"n_valid": 3, "n_cases": 4, "n_absent": 1, "n_missed": 0, "n_spurious": 0}
    summary = {"mean": scores, "mean_ci95": ends, "classes": {"liver": {**scores, **counts, "ci95": ends}}}
    return Report.from_dict(
        {"standard": summary, "samed": summary, "cases": [], "n_cases": 4, "settings": {"dataset": dataset}}
    )


def test_the_front_matter_is_what_the_hub_reads():
    assert _front_matter(model_card(_config())) == {
        "library_name": "peft",
        "base_model": "facebook/sam-vit-base",
        "tags": ["samed", "segment-anything", "medical", "image-segmentation", "lora"],
        "pipeline_tag": "image-segmentation",
    }


def test_scores_reach_the_model_index_and_a_table():
    card = model_card(_config(), report=_report())
    (entry,) = _front_matter(card)["model-index"]
    assert entry["name"] == "SAMed adapter of facebook/sam-vit-base"
    (result,) = entry["results"]
    assert result["dataset"]["name"] == "Synapse test"
    assert [(m["name"], m["value"]) for m in result["metrics"]] == [
        (name.format(convention), value)
        for convention in ("standard", "samed")
        for name, value in (
            ("dice ({})", 0.8188),
            ("hd95 ({})", 4.5),
            ("dice of liver ({})", 0.8188),
            ("hd95 of liver ({})", 4.5),
        )
    ]
    assert "| liver | 0.8188 | 4.50 | 3/4 | 0.8188 | 4.50 |" in card
    assert "4 cases of Synapse test." in card


def test_the_hubs_own_reader_understands_the_card():
    card = ModelCard(model_card(_config(method="dora"), report=_report(), training={"epochs": 3}))
    assert card.data.base_model == "facebook/sam-vit-base"
    assert card.data.tags[-1] == "dora"
    assert len(card.data.eval_results) == 8
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert (name, len(results)) == ("SAMed adapter of facebook/sam-vit-base", 8)


def test_method_and_data_are_named_and_cited():
    card = model_card(_config(method="dora"), report=_report())
    assert "arXiv 2402.09353" in card
    assert "landman2015btcv" not in card
    for dataset, cited in (
        ("Synapse multi-organ CT (BTCV)", "landman2015btcv"),
        ("Medical Segmentation Decathlon, Hippocampus", "antonelli2022decathlon"),
    ):
        card = model_card(_config(), report=_report(dataset=dataset), training={"epochs": 3})
        assert cited in card
        assert f"Trained on other cases of {dataset}" in card


def test_settings_without_a_meaning_are_left_out():
    assert "| rank | 4 |" in model_card(_config(method="oft"))
    assert "| rank |" not in model_card(_config(method="bitfit"))
    assert "| targets |" not in model_card(_config(method="full"))


@pytest.mark.parametrize("undefined", [None, math.nan])
def test_undefined_scores_are_left_out_of_the_model_index(undefined):
    card = model_card(_config(), report=_report(hd95=undefined))
    metrics = _front_matter(card)["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["dice"] * 4
    assert "| liver | 0.8188 | n/a | 3/4 | 0.8188 | n/a |" in card


def test_the_card_says_what_a_user_needs():
    card = model_card(_config(rank=6), training={"learning_rate": 0.005, "data_dir": "/home/jdoe/synapse"})
    for text in (
        'load_adapter("path/or/hub-id")',
        "predict_volume(model, scan)",
        "| 1 | spleen |",
        "| 8 | pancreas |",
        "| rank | 6 |",
        "| learning_rate | 0.005 |",
        "Not a medical device",
        "2304.13785",
        "2304.02643",
    ):
        assert text in card


def test_the_card_tells_nothing_of_the_disk():
    card = model_card(_config("/home/jdoe/weights/sam.pth"), training={"data_dir": "/home/jdoe/synapse/"})
    assert "jdoe" not in card
    assert "| base | sam.pth |" in card
    assert "| data_dir | synapse |" in card
    assert 'base="path/to/the/base"' in card
    assert "base_model" not in _front_matter(card)


def test_a_card_of_the_tiny_stand_in_says_so():
    assert "The base is not SAM" in model_card(_config("tiny-sam"))
    assert "The base is not SAM" not in model_card(_config())


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("facebook/sam-vit-base", True),
        ("sam_vit_b.pth", False),
        ("weights/sam_vit_b.pth", False),
        ("./sam", False),
        ("/srv/models/sam", False),
        ("a/b/c", False),
        ("C:\\models\\sam", False),
    ],
)
def test_hub_ids(base, expected):
    assert is_hub_id(base) is expected


def test_a_folder_is_no_hub_id(monkeypatch, tmp_path):
    (tmp_path / "models" / "sam").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("models/sam")


def test_bars_in_names_do_not_break_tables():
    card = model_card(SamedConfig(base="facebook/sam-vit-base", class_names=("left|right",)))
    assert "| 1 | left\\|right |" in card
