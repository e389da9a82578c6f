"""Fourteen steps of the original, exact resume, accumulation, divergence."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import GOLDEN, load_samed_weights, npz, samed_weights
from datasets import Dataset, DatasetInfo

from samed_peft.adapters.save_load import save_adapter
from samed_peft.config import SYNAPSE_CLASSES, SamedConfig, TrainingConfig
from samed_peft.datasets import LabelledFolder, Splits
from samed_peft.errors import InputError, NonFiniteLossError, SomeCasesFailedError, exit_resumable
from samed_peft.evaluation import evaluate_cases
from samed_peft.training import (
    Progress,
    Run,
    build_optimizer,
    claim_run_folder,
    finish_run,
    fit,
    load_checkpoint,
    require_replicas,
    run_settings,
    runs,
    save_checkpoint,
    train_step,
    training_steps,
    verifies_rows,
)
from samed_peft.training.average import WeightAverage
from samed_peft.training.batches import SlicePreparation, TrainingSlices
from samed_peft.training.claims import only_run_in
from samed_peft.training.loop import learning_rate, warn_of_warmup


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def golden_batches():
    data = npz("train.npz")
    return [
        {
            "pixel_values": torch.from_numpy(x.astype(np.float32)).expand(-1, 3, -1, -1),
            "labels": torch.from_numpy(y).long(),
        }
        for x, y in zip(data["images"], data["low_res_labels"], strict=True)
    ]


def samed_rate(step):
    return learning_rate(step, peak=0.005, warmup_steps=5, max_steps=40)


def test_fourteen_steps_reproduce_samed(fresh_model, golden_batches, accelerator):
    load_samed_weights(fresh_model, GOLDEN / "train_start.pth")
    optimizer = build_optimizer(fresh_model, weight_decay=0.1)
    model, optimizer = accelerator.prepare(fresh_model, optimizer)
    expected = npz("train.npz")
    rates = [samed_rate(step) for step in range(14)]
    np.testing.assert_allclose(rates, expected["lr"], atol=1e-12, rtol=0)
    losses = [
        train_step(model, [batch], optimizer, accelerator=accelerator, learning_rate=rate)
        for batch, rate in zip(golden_batches, rates, strict=True)
    ]
    for ours, theirs in zip(np.transpose(losses), ("loss", "loss_ce", "loss_dice"), strict=True):
        np.testing.assert_allclose(ours, expected[theirs], atol=1e-5, rtol=0)
    parameters = dict(fresh_model.named_parameters())
    for name, tensor in samed_weights(fresh_model, GOLDEN / "train_end.pth").items():
        # The softmax ignores a key's bias: its true gradient is zero, and AdamW blows up what rounding makes of that.
        allowed = 1e-3 if name.endswith("k_proj.bias") else 1e-5
        torch.testing.assert_close(parameters[name].data, tensor, atol=allowed, rtol=0)


def train(model, batches, accelerator, *, state=None, stop=None):
    optimizer = build_optimizer(model, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress() if state is None else load_checkpoint(state, model, optimizer, accelerator=accelerator)
    for step, batch in enumerate(batches[:stop]):
        if step >= progress.step:
            train_step(model, [batch], optimizer, accelerator=accelerator, learning_rate=samed_rate(step))
            progress = Progress(step=step + 1, best_dice=0.5, best_epoch=1)
    return optimizer, progress


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    golden_config, fresh_model, golden_batches, accelerator, tmp_path
):
    from samed_peft.adapters.save_load import add_lora
    from samed_peft.models.bases import load_sam

    batches = golden_batches[:6]
    start = weights(fresh_model)
    train(fresh_model, batches, accelerator)
    uninterrupted = weights(fresh_model)

    def from_start():
        torch.manual_seed(99)
        model = add_lora(
            load_sam(golden_config.base, class_names=golden_config.class_names, image_size=128), golden_config
        )
        model.load_state_dict(start, strict=False)
        return model

    first = from_start()
    optimizer, progress = train(first, batches, accelerator, stop=3)
    save_checkpoint(tmp_path, first, optimizer, progress=progress, accelerator=accelerator)
    second = from_start()
    _, progress = train(second, batches, accelerator, state=tmp_path)
    assert progress.step == 6
    resumed = weights(second)
    assert all(resumed[name].equal(uninterrupted[name]) for name in uninterrupted)
    assert not all(uninterrupted[name].equal(start[name]) for name in start)


def test_a_checkpoint_keeps_the_average(fresh_model, accelerator, tmp_path):
    optimizer = build_optimizer(fresh_model, weight_decay=0.1)
    average = WeightAverage(fresh_model, decay=0.9)
    for weight in weights_of(fresh_model):
        weight.data.add_(1.0)
    average.update(1)
    expected = {name: tensor.clone() for name, tensor in average.tensors().items()}
    state = {"accelerator": accelerator, "average": average}
    save_checkpoint(tmp_path, fresh_model, optimizer, progress=Progress(step=1), **state)
    average.update(100)
    load_checkpoint(tmp_path, fresh_model, optimizer, **state)
    assert all(average.tensors()[name].equal(tensor) for name, tensor in expected.items())
    assert len(expected) == len(weights_of(fresh_model))


def weights_of(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def test_a_checkpoint_holds_no_base_and_replaces_the_older_one(fresh_model, golden_batches, accelerator, tmp_path):
    optimizer, progress = train(fresh_model, golden_batches[:1], accelerator)
    save_checkpoint(tmp_path, fresh_model, optimizer, progress=progress, accelerator=accelerator)
    save_checkpoint(tmp_path, fresh_model, optimizer, progress=Progress(step=2), accelerator=accelerator)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    size = sum(p.stat().st_size for p in (tmp_path / "step-00000002").iterdir())
    trainable = sum(p.numel() for p in fresh_model.parameters() if p.requires_grad)
    assert size < 4 * 3 * trainable + 150_000


def test_all_of_a_checkpoint_goes_where_the_weights_are(accelerator, tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, model, optimizer, progress=Progress(1), accelerator=accelerator)
    elsewhere = torch.nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.AdamW(elsewhere.parameters())
    load_checkpoint(tmp_path, elsewhere, optimizer, accelerator=accelerator)
    kinds = optimizer.state[elsewhere.weight]
    assert {kind: value.device.type for kind, value in kinds.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )


def test_a_damaged_checkpoint_is_named(fresh_model, golden_batches, accelerator, tmp_path):
    optimizer, progress = train(fresh_model, golden_batches[:1], accelerator)
    save_checkpoint(tmp_path, fresh_model, optimizer, progress=progress, accelerator=accelerator)
    file = tmp_path / "step-00000001" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_checkpoint(tmp_path, fresh_model, optimizer, accelerator=accelerator)


def test_a_loss_that_is_not_finite_changes_nothing(fresh_model, golden_batches, accelerator):
    before = weights(fresh_model)
    golden_batches[0]["pixel_values"] = golden_batches[0]["pixel_values"] * float("nan")
    with pytest.raises(NonFiniteLossError, match="loss is nan"):
        train(fresh_model, golden_batches[:1], accelerator)
    assert all(p.equal(before[n]) for n, p in weights(fresh_model).items())


def test_bfloat16_follows_float32(fresh_model, golden_batches):
    load_samed_weights(fresh_model, GOLDEN / "train_start.pth")
    AcceleratorState._reset_state(reset_partial_state=True)  # precision is the process's, not the accelerator's
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        optimizer = build_optimizer(fresh_model, weight_decay=0.1)
        model, optimizer = accelerator.prepare(fresh_model, optimizer)
        losses = [
            train_step(model, [batch], optimizer, accelerator=accelerator, learning_rate=samed_rate(step))[0]
            for step, batch in enumerate(golden_batches[:4])
        ]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    expected = npz("train.npz")["loss"][:4]
    np.testing.assert_allclose(losses, expected, atol=0.02, rtol=0)
    assert not np.allclose(losses, expected, atol=1e-6, rtol=0)
    assert all(p.dtype == torch.float32 for p in fresh_model.parameters() if p.requires_grad)


def test_accumulated_gradients_are_the_mean(fresh_model, golden_batches, accelerator):
    optimizer = build_optimizer(fresh_model, weight_decay=0.0)
    model, optimizer = accelerator.prepare(fresh_model, optimizer)
    group = golden_batches[:2]
    loss, _, _ = train_step(model, group, optimizer, accelerator=accelerator, learning_rate=0.0)
    with torch.no_grad():
        single = [model(**batch).loss.item() for batch in group]
    assert loss == pytest.approx(np.mean(single), abs=1e-6)


def test_gradients_are_clipped_to_their_common_norm(fresh_model, golden_batches, accelerator):
    """AdamW's first moment after one step is a tenth of the gradient that it was given."""
    moments = {}
    for most in (0.0, 1e6, 1e-3):
        optimizer = build_optimizer(fresh_model, weight_decay=0.0, lora_plus_ratio=4, max_grad_norm=most)
        model, prepared = accelerator.prepare(fresh_model, optimizer)
        train_step(model, golden_batches[:1], prepared, accelerator=accelerator, learning_rate=0.0)
        moments[most] = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
    norm = 10 * moments[0.0].norm()
    assert norm > 1e-3
    torch.testing.assert_close(moments[1e6], moments[0.0])
    torch.testing.assert_close(moments[1e-3], moments[0.0] * 1e-3 / norm)


def test_validation_keeps_the_earlier_of_equals_and_no_nan():
    first = Progress(step=4).validated(float("nan"), epoch=1)
    assert first.best_epoch is None
    best = first.validated(0.5, epoch=2).validated(0.5, epoch=3).validated(float("nan"), epoch=4)
    assert (best.best_dice, best.best_epoch) == (0.5, 2)


class NotedRows(list):
    """Rows that note which of them are read."""

    def __init__(self, rows):
        super().__init__(rows)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("start", [0, 2, 4])
def test_each_epoch_sees_every_slice_once_and_its_last_group_may_be_smaller(fresh_model, accelerator, start):
    rng = np.random.default_rng(0)
    size = fresh_model.samed_config.image_size
    rows = NotedRows(
        {"image": rng.random((size, size), np.float32), "label": rng.integers(0, 3, (size, size), np.uint8)}
        for _ in range(5)
    )
    slices = TrainingSlices(rows, SlicePreparation(size, fresh_model.logits_size))
    training = TrainingConfig(epochs=2, stop_epoch=2, batch_size=1, accumulation_steps=2, num_workers=0)
    model, optimizer = accelerator.prepare(fresh_model, build_optimizer(fresh_model, weight_decay=0.0))
    steps = training_steps(model, optimizer, slices, training=training, accelerator=accelerator, start=start)
    counts = []
    for step in steps:
        counts.append(len(rows.read))
        assert step.ends_epoch == (step.number % 3 == 0)
    assert np.diff([0, *counts]).tolist() == [2, 2, 1, 2, 2, 1][start:]
    assert sorted(rows.read[-5:]) == [0, 1, 2, 3, 4] if start <= 3 else len(rows.read) == 3


def test_a_run_folder_is_claimed_once(tmp_path):
    folder, settings, accelerator = tmp_path / "run", {"rank": 4, "seed": 1}, Accelerator(cpu=True)
    claim_run_folder(folder, settings, resume=False, accelerator=accelerator)
    with pytest.raises(InputError, match="--resume"):
        claim_run_folder(folder, settings, resume=False, accelerator=accelerator)
    claim_run_folder(folder, settings, resume=True, accelerator=accelerator)
    with pytest.raises(InputError, match="rank: 4 there, 8 now"):
        claim_run_folder(folder, settings | {"rank": 8}, resume=True, accelerator=accelerator)
    # A note of another version in other words decides nothing.
    claim_run_folder(folder, settings | {"note": "reworded"}, resume=True, accelerator=accelerator)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="found other files, which must not be lost"):
        claim_run_folder(tmp_path / "other", settings, resume=True, accelerator=accelerator)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match=r"expected a folder above .*, but .*thesis\.txt is a file"):
        claim_run_folder(tmp_path / "other" / "thesis.txt" / "run", settings, resume=False, accelerator=accelerator)


HOLDS_A_RUN = """
import sys
from pathlib import Path
from accelerate import Accelerator
from samed_peft.training.claims import only_run_in
with only_run_in(Path(sys.argv[1]), accelerator=Accelerator(cpu=True)):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_second_run_in_a_folder_is_refused_with_the_process_it_found(tmp_path, accelerator):
    (tmp_path / "run.json").write_text("{}")
    command = [sys.executable, "-c", HOLDS_A_RUN, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"holds\n"
        number = f" ({other.pid})" if Path("/proc/locks").is_file() else ""
        message = re.escape(f"another process{number} is training in {tmp_path}; wait")
        with pytest.raises(InputError, match=message), only_run_in(tmp_path, accelerator=accelerator):
            pass
        other.kill()
    with only_run_in(tmp_path, accelerator=accelerator):
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.fixture
def recorded(tmp_path, accelerator):
    """Function that claims a folder with a run whose record lacks some settings, and differs in others."""
    config = SamedConfig("tiny-sam", SYNAPSE_CLASSES)
    settings = run_settings(config, TrainingConfig(), data=["scans-1234"], accelerator=accelerator)

    def resume(*, without=(), **changed):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        record = {name: value for name, value in (settings | changed).items() if name not in without}
        (folder / "run.json").write_text(json.dumps(record))
        claim_run_folder(folder, settings, resume=True, accelerator=accelerator)

    return resume


def test_a_run_of_an_older_version_had_the_defaults_of_later_settings(recorded):
    fields = [field for kind in (SamedConfig, TrainingConfig) for field in dataclasses.fields(kind)]
    with_default = [field.name for field in fields if field.default is not dataclasses.MISSING]
    assert len(with_default) > 30
    for name in with_default:
        recorded(without=[name])
    recorded(without=with_default)


def test_settings_without_default_or_of_other_value_are_refused(recorded):
    for name in ("base", "class_names", "data", "num_processes", "mixed_precision"):
        with pytest.raises(InputError, match=f"{name}: None there, "):
            recorded(without=[name])
    with pytest.raises(InputError, match="rank: 8 there, 4 now"):
        recorded(without=["seed"], rank=8)


def test_a_base_is_recorded_by_its_absolute_path(accelerator, tmp_path, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    config = SamedConfig("sam_base.pth", SYNAPSE_CLASSES, image_size=128)
    folder = LabelledFolder(tmp_path, SYNAPSE_CLASSES, None, {}, {})
    rows = Dataset.from_dict({}, info=DatasetInfo(config_name="none"))
    run = Run(config, TrainingConfig(), rows, tmp_path / "run", folder, Splits([], [], []))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(InputError, match=f"base: None there, {re.escape(str(GOLDEN))}/sam_base.pth now"):
        fit(run, accelerator=accelerator)


@pytest.mark.parametrize(
    ("process", "local", "expected"), [(0, 0, True), (1, 1, False), (7, 7, False), (8, 0, True), (9, 1, True)]
)
def test_rows_are_verified_once_where_the_main_process_runs(process, local, expected):
    accelerator = SimpleNamespace(is_main_process=process == 0, process_index=process, local_process_index=local)
    assert verifies_rows(accelerator) is expected


def test_a_run_whose_test_failed_in_part_is_done_but_not_pushed(golden_model, tmp_path, accelerator, capsys):
    save_adapter(golden_model, tmp_path / "adapter")
    folder = LabelledFolder(tmp_path, SYNAPSE_CLASSES, None, {}, {})
    rows = Dataset.from_dict({}, info=DatasetInfo(config_name="none"))
    run = Run(golden_model.samed_config, TrainingConfig(), rows, tmp_path, folder, Splits([], [], []))
    mask = np.ones((1, 4, 4), np.uint8)
    whole = evaluate_cases({"a": mask}, {"a": mask}, class_names=SYNAPSE_CLASSES)
    report = dataclasses.replace(whole, settings={"failed_cases": {"b": "KeyError: 'x'"}})
    with pytest.raises(SomeCasesFailedError, match="1 of 2 cases failed; the report names them"):
        finish_run(run, tmp_path / "adapter", report, accelerator=accelerator, repo_id="someone/adapter")
    assert "1 failed and left out: b" in capsys.readouterr().out
    assert "model-index:" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_stops_a_run_until_its_results_are_whole(when, golden_model, tmp_path, accelerator, monkeypatch):
    """The wait for all processes is where their ways part: this one gets a signal in it, or right after it."""
    save_adapter(golden_model, tmp_path / "adapter")
    run = SimpleNamespace(output_dir=tmp_path, plan=None, training=TrainingConfig())
    waits_until = runs.stop_on_any_process
    if when == "before":
        monkeypatch.setattr(
            runs, "stop_on_any_process", lambda *given: os.kill(os.getpid(), signal.SIGTERM) or waits_until(*given)
        )
    else:
        monkeypatch.setattr(accelerator, "end_training", lambda: os.kill(os.getpid(), signal.SIGTERM))
    program = exit_resumable(partial(finish_run, run, tmp_path / "adapter", None, accelerator=accelerator))
    with pytest.raises(SystemExit, match="75") if when == "before" else nullcontext():
        program()


def test_a_model_split_over_processes_is_refused():
    with pytest.raises(InputError, match="found FSDP in Accelerate's configuration"):
        require_replicas(SimpleNamespace(distributed_type=DistributedType.FSDP))


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_the_double_batch(tmp_path):
    """The worker trains five steps on slices of the golden batches, the last one too small for two processes."""
    worker = str(Path(__file__).with_name("two_process_worker.py"))
    options = {"capture_output": True, "text": True, "check": False, "timeout": 120}
    options["env"] = os.environ | {"PYTHONPATH": str(GOLDEN.parent)}
    one = subprocess.run([sys.executable, worker], **options)
    assert one.returncode == 0, one.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker]
    two = subprocess.run(launch, **options)
    assert two.returncode == 0, two.stderr
    losses = [np.array(run.stdout.split(), dtype=float) for run in (one, two)]
    assert len(losses[0]) == 14
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5, rtol=0)
    assert losses[0][0] - losses[0][-2] > 0.001


@pytest.mark.parametrize("total", [1, 2, 4])
def test_a_training_within_its_warm_up_is_told_with_the_rate_it_reaches(total):
    training = TrainingConfig(learning_rate=0.008, warmup_steps=4)
    reached = max(learning_rate(step, peak=0.008, warmup_steps=4, max_steps=total) for step in range(total))
    with pytest.warns(UserWarning, match=rf"all {total} steps .* warm-up of 4, .* rises to {reached:g} of 0\.008"):
        warn_of_warmup(total, training)
    warn_of_warmup(5, training)
