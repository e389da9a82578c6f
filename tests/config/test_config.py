"""Configurations refuse what cannot work and survive JSON."""

import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from samed_peft.config import METHODS, SYNAPSE_CLASSES, SamedConfig, TrainingConfig
from samed_peft.config.fields import JsonFields, described
from samed_peft.config.methods import METHOD_FIELDS
from samed_peft.config.options import add_options, add_run_options, parse_run_options
from samed_peft.errors import InputError


def test_defaults_are_sameds():
    training = TrainingConfig()
    assert (training.learning_rate, training.warmup_steps, training.weight_decay) == (0.005, 250, 0.1)
    assert (training.epochs, training.stop_epoch, training.batch_size, training.seed) == (200, 160, 24, 1234)
    assert (training.dice_weight, training.decay_power) == (0.8, 0.9)
    config = SamedConfig("b", SYNAPSE_CLASSES)
    assert (config.image_size, config.rank, config.window, config.num_labels) == (512, 4, (-125.0, 275.0), 9)


@pytest.mark.parametrize("config", [SamedConfig("b", ("x", "y"), window=None), TrainingConfig(seed=3)])
def test_json_round_trip(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values",
    [
        {"class_names": ()},
        {"class_names": ("a", "a")},
        {"rank": 0},
        {"image_size": 0},
        {"input_size": -1},
        {"window": (5.0, 5.0)},
        {"resampling": "nearest"},
        {"targets": ("qkv",)},
        {"dropout": 1.0},
        {"orientation": "FOO"},
        {"orientation": "las"},
        {"orientation": "LLL"},
        {"orientation": "LA"},
        {"orientation": 7},
        {"class_names": "abcdefgh"},
        {"class_names": (1, 2)},
        {"rank": "4"},
        {"rank": True},
        {"image_size": 128.5},
        {"base": 5},
        {"window": ("a", "b")},
        {"window": (0.0, 1.0, 2.0)},
        {"targets": (("q_proj",),)},
        {"base_revision": 5},
    ],
)
def test_bad_adapters_are_refused(values):
    with pytest.raises(InputError, match=next(iter(values))):
        SamedConfig(**({"base": "b", "class_names": ("a",)} | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channel": -1}, "channel must be 0 or more, or None; found -1"),
        ({"input_size": 0}, "input_size must be positive, or None; found 0"),
        ({"resampling": "spline"}, "resampling must be samed or aligned; found 'spline'"),
        ({"resampling": "aligned", "input_size": 224}, "must be None with aligned; found 224: leave input_size out"),
        ({"window": (1, 0)}, r"window must be \(low, high\) with low < high, or two .*, or None; found \(1, 0\)"),
        ({"orientation": "las"}, "one each of L or R, A or P, S or I, such as LAS, or None; found 'las'"),
        ({"method": "oft", "rank": 1}, "rank must be at least 2 for oft, .*the rank is the size of a block"),
    ],
)
def test_the_allowed_values_are_told(values, message):
    with pytest.raises(InputError, match=message):
        SamedConfig("b", ("a",), **values)


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 0},
        {"seed": -1},
        {"stop_epoch": 201},
        {"dice_weight": 1.5},
        {"learning_rate": float("nan")},
        {"epochs": "200"},
        {"augment": 1},
        {"max_minutes": 0.0},
        {"max_minutes": float("inf")},
        {"max_minutes": 1.0, "max_steps": 5},
        {"max_steps": 0},
        {"patience": -1},
        {"stop_step": 3},
        {"stop_step": 3, "max_steps": 2},
    ],
)
def test_bad_training_is_refused(values):
    with pytest.raises(InputError, match=next(iter(values))):
        TrainingConfig(**values)


def run_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--validation_cases", nargs="+", default=[])
    add_run_options(parser)
    return parser


@pytest.mark.parametrize(
    ("options", "stop_epoch"),
    [([], 160), (["--epochs", "1"], 1), (["--epochs", "180"], 160), (["--epochs", "9", "--stop_epoch", "3"], 3)],
)
def test_epochs_alone_shorten_a_run(options, stop_epoch):
    _, _, training = parse_run_options(run_parser(), ["--output_dir", "x", *options])
    assert training.stop_epoch == stop_epoch


def sharing_parser():
    parser = run_parser()
    parser.add_argument("--validation_share", type=float, default=0.2)
    parser.set_defaults(validate_epochs=1)
    return parser


@pytest.mark.parametrize(
    ("options", "share", "epochs"),
    [
        ([], 0.2, 1),
        (["--validate_epochs", "3"], 0.2, 3),
        (["--validation_share", "0.4"], 0.4, 1),
        (["--validation_share", "0"], 0.0, 0),
        (["--validate_epochs", "0"], 0.0, 0),
        (["--validation_cases", "a"], 0.0, 1),
        (["--max_steps", "5", "--validate_epochs", "999"], 0.2, 999),
    ],
)
def test_recipes_with_a_share_validate_by_default(options, share, epochs):
    args, _, training = parse_run_options(sharing_parser(), ["--output_dir", "x", *options])
    assert (args.validation_share, training.validate_epochs) == (share, epochs)


@pytest.mark.parametrize(
    "options",
    [["--validation_cases", "a", "--validate_epochs", "0"], ["--validation_share", "0", "--validate_epochs", "2"]],
)
def test_a_validation_of_no_case_or_in_no_epoch_is_refused(capsys, options):
    with pytest.raises(SystemExit, match="2"):
        parse_run_options(sharing_parser(), ["--output_dir", "x", *options])
    assert "--validate_epochs and --validation_cases go together" in capsys.readouterr().err


def shown(parser):
    """Help without its line breaks."""
    return " ".join(parser.format_help().split())


def test_a_description_on_two_lines_is_shown_whole():
    @dataclass(frozen=True)
    class Config(JsonFields):
        """A config."""

        share: float = described("share of slices,\nat most 100 %", 0.5)

    parser = argparse.ArgumentParser()
    add_options(parser, Config)
    assert "share of slices, at most 100 % (default: 0.5)" in shown(parser)


@pytest.mark.parametrize(("kind", "names"), [(SamedConfig, METHOD_FIELDS), (TrainingConfig, None)])
def test_options_and_documentation_have_the_texts_of_the_fields(kind, names):
    parser = argparse.ArgumentParser()
    add_options(parser, kind, names)
    for field in fields(kind):
        assert f"{field.name}: {field.metadata['help']}." in kind.__doc__
        optional = names is None or field.name in names
        assert (f"{field.metadata['help']} (default: {field.default})" in shown(parser)) is optional


def test_the_readme_lists_each_method_by_its_record():
    rows = []
    for name, method in METHODS.items():
        as_lora = name != "lora" and method.options == METHODS["lora"].options
        options = "as `lora`" if as_lora else ", ".join(method.options)
        extra = f'; needs `pip install "samed_peft[{method.extra}]"`' if method.extra else ""
        rows.append(f"| `{name}` | {method.summary}{extra} | {options} | {method.storage} |")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert (
        "\n".join(["| `--method` | how the encoder is adapted | options | saved |", "| --- | --- | --- | --- |", *rows])
        in readme
    )


def test_more_epochs_to_stop_at_than_there_are_is_refused():
    with pytest.raises(InputError, match=r"stop_epoch \(12\) must not exceed epochs \(9\); give stop_epoch, .*too"):
        parse_run_options(run_parser(), ["--output_dir", "x", "--epochs", "9", "--stop_epoch", "12"])


def test_options_of_every_recipe(capsys):
    args, adapter, training = parse_run_options(
        run_parser(), ["--output_dir", "x", "--rank", "8", "--seed", "3", "--base", "b"]
    )
    assert (args.base, adapter["rank"], adapter["targets"], training.seed) == ("b", 8, ("q_proj", "v_proj"), 3)
    assert SamedConfig(args.base, ("a",), **adapter).rank == 8
    with pytest.raises(SystemExit, match="2"):
        parse_run_options(run_parser(), ["--output_dir", "x", "--validate_epochs", "1"])
    assert "--validate_epochs and --validation_cases go together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "rank must be at least 1"),
        (["--image_size", "-64"], "image_size must be"),
        (["--targets", "words"], "targets must"),
        (["--dropout", "2"], "dropout must"),
    ],
)
def test_values_out_of_range_are_refused_before_data_are_read(options, message):
    with pytest.raises(InputError, match=message):
        parse_run_options(run_parser(), ["--output_dir", "x", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "ia3", "--rank", "8"], "--rank means nothing to --method ia3, only to lora, rslora"),
        (["--method", "bitfit", "--targets", "k_proj"], "--targets means nothing to --method bitfit"),
        (["--method", "vera", "--lora_plus_ratio", "2"], "--lora_plus_ratio means nothing to --method vera"),
        (["--epochs", "2", "--max_minutes", "5"], "--epochs 2 and --max_minutes 5.0 each decide how long the training"),
        (["--max_steps", "2", "--max_minutes", "5"], "--max_minutes 5.0 and --max_steps 2 each decide how long the"),
        (["--patience", "3"], "--patience 3 counts validations, but this run makes none; leave it out, or choose"),
        (["--epochs", "1", "--validate_epochs", "2", "--validation_cases", "a"], "2 never validates in 1 epochs"),
    ],
)
def test_options_without_effect_are_refused(capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        parse_run_options(run_parser(), ["--output_dir", "x", *options])
    assert message in capsys.readouterr().err


def test_a_bottleneck_wider_than_the_model_is_told():
    with pytest.warns(UserWarning, match=r"input_size \(224\) is larger than image_size \(128\)"):
        SamedConfig("x", ("a",), image_size=128, input_size=224)
    SamedConfig("x", ("a",), image_size=224, input_size=224)


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(InputError, match="no field colour"):
        SamedConfig.from_dict({"base": "b", "class_names": ["a"], "colour": 1})
    with pytest.raises(InputError, match="class_names"):
        SamedConfig.from_dict({"base": "b"})
    for values in ([1], "x", 3, None):
        with pytest.raises(InputError, match="must be an object of fields"):
            SamedConfig.from_dict(values)


def test_a_long_list_of_names_is_not_printed_whole():
    with pytest.raises(InputError, match="found 300: ") as refused:
        SamedConfig("b", tuple(f"class {label}" for label in range(300)))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("codes", ["LAS", "RPI", "SAL"])
def test_orientations_of_any_order_are_taken(codes):
    assert SamedConfig("b", ("a",), orientation=codes).orientation == codes
