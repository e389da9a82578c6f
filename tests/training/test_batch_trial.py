"""Batches of a plan that do not fit in memory: found before the first step, by real errors of the allocator."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys

import datasets
import pytest
import torch
from accelerate import Accelerator
from conftest import write_balls
from torch import nn

from samed_peft.config import SamedConfig, TrainingConfig
from samed_peft.datasets import Splits, load_slices, open_folder
from samed_peft.errors import InputError
from samed_peft.training import Machine, Run, batch_trial, fit, planned_options
from samed_peft.training.batch_trial import BATCH_FILE, largest_batch, recorded_batch

CPU = Machine("cpu", "any", 20.0, 2)
SHORT = {"max_steps": 3, "image_size": 32, "num_workers": 0, "validate_epochs": 0, "folds": 3}


def run_out_of_memory():
    """An error of PyTorch's allocator: no machine has a pebibyte."""
    torch.empty(2**50, dtype=torch.uint8)


class Hungry(nn.Module):
    """Stand-in for a model whose memory holds a few slices."""

    def __init__(self, most):
        super().__init__()
        self.most, self.seen = most, []

    def forward(self, batch_size):
        self.seen.append(batch_size)
        if batch_size > self.most:
            run_out_of_memory()


@pytest.mark.parametrize(
    ("planned", "most", "tried"),
    [(16, 16, [16]), (16, 3, [16, 8, 4, 2]), (12, 1, [12, 6, 3, 1]), (15, 6, [15, 5]), (7, 3, [7, 1]), (1, 1, [1])],
)
def test_batches_are_halved_to_parts_of_the_planned_one(planned, most, tried):
    model = Hungry(most)
    assert largest_batch(planned, model) == tried[-1]
    assert model.seen == tried


def test_nothing_fits_and_other_errors_are_raised():
    assert largest_batch(4, Hungry(0)) == 0

    def fail(batch_size):
        raise ValueError(f"a bug at {batch_size}")

    with pytest.raises(ValueError, match="a bug at 4"):
        largest_batch(4, fail)

    def lack_memory_in_numpy(batch_size):
        if batch_size > 1:
            raise MemoryError

    assert largest_batch(4, lack_memory_in_numpy) == 1


@pytest.mark.slow
def test_with_a_limit_of_the_system_the_allocator_itself_refuses():
    code = """
import resource, sys, torch
from samed_peft.training.batch_trial import largest_batch
torch.set_num_threads(1)
layer = torch.nn.Linear(1024, 1024)
layer(torch.ones(2, 1024, requires_grad=True)).sum().backward()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 400 * 2**20,) * 2)
def try_batch(batch_size):  # 64 MiB a slice, forward and backward some of that each
    layer(torch.ones(batch_size, 2**14, 1024, requires_grad=True)).square().sum().backward()
print(largest_batch(32, try_batch))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in (1, 2)


@pytest.fixture(scope="module")
def balls(tmp_path_factory):
    """Function that makes a planned run on twelve slices of two scans."""
    root = tmp_path_factory.mktemp("data") / "balls"
    write_balls(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        folder = open_folder(root)

        def run(output_dir, **given):
            adapter, training, _, plan = planned_options(folder, base="tiny-sam", given=SHORT | given, machine=CPU)
            config = SamedConfig("tiny-sam", **adapter)
            shown = {"num_classes": 1, "orientation": config.orientation, "window": config.window}
            rows = load_slices(folder, ["p1_a", "p1_b"], **shown)
            return Run(config, training, rows, output_dir, folder, Splits(["p1_a", "p1_b"], [], []), None, plan)

        yield run


@pytest.fixture
def memory_for(monkeypatch):
    """Function that gives models memory for so many slices, and lists the batches that they are shown."""
    module = importlib.import_module("samed_peft.training.fit")  # the function has the module's name
    seen, most = [], [99]
    fresh = module._fresh_model

    def limited(run, accelerator):
        model = fresh(run, accelerator)

        def check(_, __, given):
            seen.append(len(given["pixel_values"]))
            if seen[-1] > most[0]:
                run_out_of_memory()

        model.register_forward_pre_hook(check, with_kwargs=True)
        return model

    monkeypatch.setattr(module, "_fresh_model", limited)

    def memory_for(slices):
        most[0] = slices
        seen.clear()
        return seen

    return memory_for


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def train(run, **options):
    return fit(run, accelerator=Accelerator(cpu=True), **options)


def test_a_planned_run_trains_as_if_it_had_been_given_the_batch_that_fits(balls, memory_for, tmp_path, capsys):
    planned = balls(tmp_path / "planned")
    planned = dataclasses.replace(planned, training=dataclasses.replace(planned.training, batch_size=4))
    seen = memory_for(3)
    adapter, settings = train(planned)
    halved = {"batch_size": 2, "accumulation_steps": 2}
    assert seen[:2] == [4, 2]
    assert max(seen[1:]) == 2
    assert json.loads((tmp_path / "planned" / BATCH_FILE).read_text()) == halved
    assert {name: settings[name] for name in halved} == halved
    told = "a batch of 4 slices does not fit in memory as planned: 2 at a time, 2 times for each optimizer step of 4"
    assert capsys.readouterr().out.count(told) == 1
    memory_for(99)
    other = dataclasses.replace(planned, output_dir=tmp_path / "given", plan=None)
    given, _ = train(dataclasses.replace(other, training=dataclasses.replace(planned.training, **halved)))
    assert weights(given) == weights(adapter)
    whole, _ = train(dataclasses.replace(other, output_dir=tmp_path / "whole"))
    assert weights(whole) != weights(adapter)


def test_a_run_that_goes_on_tries_nothing_and_keeps_its_batch(balls, memory_for, tmp_path):
    run = balls(tmp_path / "run")
    size = run.training.batch_size
    memory_for(size // 2)
    train(run)
    seen = memory_for(99)  # more memory now
    longer = balls(tmp_path / "run", max_steps=5)
    train(dataclasses.replace(longer, training=dataclasses.replace(run.training, max_steps=5)), resume=True)
    assert seen
    assert max(seen) == size // 2


def test_a_trial_leaves_no_trace(balls, memory_for, tmp_path):
    planned = balls(tmp_path / "planned")
    seen = memory_for(99)
    adapter, _ = train(planned)
    tried = len(seen)
    without, _ = train(dataclasses.replace(planned, output_dir=tmp_path / "without", plan=None))
    assert weights(adapter) == weights(without)
    assert tried == len(seen) - tried + 1  # one batch more
    assert recorded_batch(tmp_path / "planned")["batch_size"] == planned.training.batch_size
    assert not (tmp_path / "without" / BATCH_FILE).exists()


def test_a_pass_restores_mode_gradients_and_random_state(balls, tmp_path, fresh_model):
    run = balls(tmp_path / "run")
    slices = batch_trial.TrainingSlices(run.rows, _preparation(fresh_model))
    fresh_model.eval()
    before = torch.get_rng_state()
    state = {name: value.clone() for name, value in fresh_model.state_dict().items()}
    batch_trial.pass_once(fresh_model, slices, 2, dice_weight=0.8, accelerator=Accelerator(cpu=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert not fresh_model.training
    assert all(parameter.grad is None for parameter in fresh_model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in fresh_model.state_dict().items())


def _preparation(model):
    from samed_peft.training.batches import SlicePreparation

    return SlicePreparation(128, model.logits_size, aligned=True)


def test_a_batch_that_users_chose_is_not_tried(balls, memory_for, tmp_path):
    memory_for(1)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train(balls(tmp_path / "run", batch_size=2))


def test_memory_for_less_than_a_slice_is_refused(balls, memory_for, tmp_path):
    memory_for(0)
    with pytest.raises(
        InputError, match=r"memory for one slice .*found too little on cpu; free memory, or give --grad"
    ):
        train(balls(tmp_path / "run"))


@pytest.mark.parametrize("content", ["[]", '{"batch_size": 2}', '{"batch_size": 0, "accumulation_steps": 1}'])
def test_a_damaged_record_of_the_batch_is_named(tmp_path, content):
    (tmp_path / BATCH_FILE).write_text(content)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / BATCH_FILE))):
        recorded_batch(tmp_path)
    assert TrainingConfig().batch_size == 24


_WORKER = """
import os, sys
os.environ["ACCELERATE_USE_CPU"] = "true"
from pathlib import Path
import numpy as np, torch
from accelerate import Accelerator
from samed_peft.adapters.save_load import add_lora
from samed_peft.config import SamedConfig, TrainingConfig
from samed_peft.models.bases import load_sam
from samed_peft.training import build_optimizer, training_steps
from samed_peft.training.batch_trial import pass_once, settle_batch
from samed_peft.training.batches import SlicePreparation, TrainingSlices
torch.set_num_threads(1)
folder, tries = Path(sys.argv[1]), sys.argv[2] == "trial"
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
config = SamedConfig("tiny-sam", ("a",), image_size=32)
model = add_lora(load_sam("tiny-sam", class_names=("a",), image_size=32), config)
optimizer = build_optimizer(model, weight_decay=0.1)
prepared, stepping = accelerator.prepare(model, optimizer)
rng = np.random.default_rng(0)
rows = [{"image": rng.random((32, 32), np.float32), "label": rng.integers(0, 2, (32, 32), np.uint8)} for _ in range(8)]
slices = TrainingSlices(rows, SlicePreparation(32, model.logits_size))
training = TrainingConfig(batch_size=4, max_steps=2, warmup_steps=0, num_workers=0)

def try_batch(size):
    if size > 4 - 2 * accelerator.process_index:  # the second process has less memory
        torch.empty(2**50, dtype=torch.uint8)
    pass_once(model, slices, size, dice_weight=0.8, accelerator=accelerator)

if tries:
    training = settle_batch(folder, training, try_batch=try_batch, accelerator=accelerator)
else:
    import dataclasses
    training = dataclasses.replace(training, batch_size=2, accumulation_steps=2)
steps = training_steps(prepared, stepping, slices, training=training, accelerator=accelerator)
losses = [step.loss for step in steps]
if accelerator.is_main_process:
    print(training.batch_size, training.accumulation_steps, *losses)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_agree_on_the_smallest_batch_and_train_on_as_if_nothing_was_tried(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    options = {"capture_output": True, "text": True, "check": False, "timeout": 240}
    tried, given = (subprocess.run([*launch, str(tmp_path), kind], **options) for kind in ("trial", "given"))
    assert (tried.returncode, given.returncode) == (0, 0), tried.stderr + given.stderr
    told, numbers = tried.stdout.splitlines()
    assert told.startswith("a batch of 4 slices does not fit in memory as planned: 2 at a time, 2 times for each")
    assert told.endswith("optimizer step of 8 slices")
    assert numbers.startswith("2 2 ")
    assert numbers == given.stdout.strip()
    assert recorded_batch(tmp_path) == {"batch_size": 2, "accumulation_steps": 2}


def test_a_planned_run_that_is_refused_leaves_no_record_of_its_batch(balls, tmp_path):
    run = balls(tmp_path / "run")
    short = dataclasses.replace(run.training, max_steps=None, max_minutes=0.0001)
    with pytest.raises(InputError, match=r"max_minutes 0\.0001"):
        train(dataclasses.replace(run, training=short))
    assert not (tmp_path / "run").exists()
