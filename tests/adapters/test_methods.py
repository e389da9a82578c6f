"""Every method: trained weights, save -> load -> the same logits, merged the same; ranks, layers, LoRA+, AdaLoRA."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from samed_peft.adapters.save_load import add_lora, load_adapter, save_adapter
from samed_peft.config import METHODS, SamedConfig, Storage, TrainingConfig
from samed_peft.conversion.exports import export_peft_fused, export_samed
from samed_peft.conversion.samed_format import read_samed
from samed_peft.errors import InputError
from samed_peft.models.bases import load_sam
from samed_peft.models.precision import cast_frozen_weights
from samed_peft.training import (
    Progress,
    build_optimizer,
    claim_run_folder,
    load_checkpoint,
    save_checkpoint,
    training_steps,
)
from samed_peft.training.adalora import allocation_tensors, prune_ranks
from samed_peft.training.batches import SlicePreparation, TrainingSlices

CONFIG = SamedConfig("tiny-sam", ("body", "head"), image_size=64, window=None)
WITHOUT_EXTRAS = [name for name, method in METHODS.items() if method.extra is None]  # QLoRA has a file of its own
EVERY = [(m, "full") for m in WITHOUT_EXTRAS] + [(m, "lora") for m in WITHOUT_EXTRAS if "decoder" in METHODS[m].options]


def fresh(config=CONFIG):
    torch.manual_seed(0)
    return add_lora(load_sam(config.base, class_names=config.class_names, image_size=config.image_size), config)


def trained(config=CONFIG):
    """A model whose trainable weights were moved as a training would."""
    model, generator = fresh(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def logits(model, pixels):
    with torch.inference_mode():
        return model(pixel_values=pixels).logits


@pytest.mark.parametrize(("method", "decoder"), EVERY)
def test_saved_loaded_and_merged_logits_are_the_same(method, decoder, pixels, tmp_path):
    config = dataclasses.replace(CONFIG, method=method, decoder=decoder)
    model = trained(config)
    expected = logits(model, pixels)
    save_adapter(model, tmp_path / "adapter", config=config)
    loaded = load_adapter(tmp_path / "adapter")
    stock = load_sam(config.base, class_names=config.class_names, image_size=64)
    by_peft = logits(PeftModel.from_pretrained(stock, tmp_path / "adapter").eval(), pixels)
    if METHODS[method].storage is not Storage.AS_TRAINED:  # other matrices with the same product
        torch.testing.assert_close(logits(loaded, pixels), expected, atol=1e-6, rtol=0)
        assert by_peft.equal(logits(loaded, pixels))
    else:
        assert logits(loaded, pixels).equal(expected)
        assert by_peft.equal(expected)
    merged = load_adapter(tmp_path / "adapter", merge=True)
    assert not any("default" in name or "base_layer" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged, pixels), expected, atol=1e-6, rtol=0)
    # Nothing would be shown if the encoder's part of the adapter did nothing.
    if method != "decoder":
        plain = fresh(dataclasses.replace(CONFIG, method="decoder")).base_model.model
        assert not torch.equal(merged.vision_encoder(pixels)[0], plain.vision_encoder(pixels)[0])


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_a_merged_model_can_be_adapted_again(method, pixels, tmp_path):
    config = dataclasses.replace(CONFIG, method=method)
    save_adapter(trained(config), tmp_path / "adapter", config=config)
    merged = load_adapter(tmp_path / "adapter", merge=True)
    expected = merged.vision_encoder(pixels)[0]
    assert add_lora(merged, CONFIG).base_model.model.vision_encoder(pixels)[0].equal(expected)


@pytest.mark.parametrize("method", ["vera", "oft", "ia3"])
def test_peft_alone_does_not_merge_them_beside_modules_trained_in_full(method):
    # Once it does, `merged` can leave these modules to it.
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        trained(dataclasses.replace(CONFIG, method=method)).merge_and_unload()


@pytest.mark.parametrize(("method", "decoder"), EVERY)
def test_every_trainable_weight_gets_a_gradient_in_float32_and_bfloat16(method, decoder, pixels):
    config = dataclasses.replace(CONFIG, method=method, decoder=decoder)
    labels = torch.ones(2, 32, 32, dtype=torch.long)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = trained(config)
        cast_frozen_weights(model, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, p in trainable.items() if p.grad is None] == []
        assert all(p.dtype == torch.float32 for p in trainable.values())
        found.append(loss.item())
    assert found[1] == pytest.approx(found[0], abs=0.02)


@pytest.mark.parametrize("method", [name for name in WITHOUT_EXTRAS if "targets" in METHODS[name].options])
def test_a_new_adapter_changes_nothing_of_the_encoder(method, pixels):
    plain = load_sam(CONFIG.base, class_names=CONFIG.class_names, image_size=64)
    expected = plain.vision_encoder(pixels)[0]
    found = add_lora(plain, dataclasses.replace(CONFIG, method=method)).base_model.model.vision_encoder(pixels)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def adapted(model):
    return {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def test_layers_targets_and_patterns_choose_what_is_adapted(pixels, tmp_path):
    config = dataclasses.replace(
        CONFIG, layers=(0, 5), targets=("k_proj", "proj", "lin2"), rank=2, rank_pattern={r"layers.5.attn.\w+": 3}
    )
    model = trained(config)
    assert {name: layer.r["default"] for name, layer in adapted(model).items()} == {
        "vision_encoder.layers.0.attn.k_proj": 2,
        "vision_encoder.layers.0.attn.proj": 2,
        "vision_encoder.layers.0.mlp.lin2": 2,
        "vision_encoder.layers.5.attn.k_proj": 3,
        "vision_encoder.layers.5.attn.proj": 3,
        "vision_encoder.layers.5.mlp.lin2": 2,
    }
    assert {layer.scaling["default"] for layer in adapted(model).values()} == {1}
    save_adapter(model, tmp_path / "adapter", config=config)
    assert load_adapter(tmp_path / "adapter").samed_config.rank_pattern == config.rank_pattern
    assert logits(load_adapter(tmp_path / "adapter"), pixels).equal(logits(model, pixels))


def test_factors_of_an_mlp_are_of_its_second_inputs(pixels, tmp_path):
    config = dataclasses.replace(CONFIG, method="ia3", targets=("v_proj", "lin1", "lin2"), decoder="lora")
    model = trained(config)
    sizes = {n.split(".")[-3]: p.numel() for n, p in model.named_parameters() if "ia3_l" in n and "vision_encoder" in n}
    vision = model.config.vision_config
    assert sizes == {"v_proj": vision.hidden_size, "lin1": vision.mlp_dim, "lin2": vision.mlp_dim}
    save_adapter(model, tmp_path / "adapter", config=config)
    assert logits(load_adapter(tmp_path / "adapter"), pixels).equal(logits(model, pixels))


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_pattern_of_ranks_survives_the_way_to_lora(method, pixels, tmp_path):
    pattern = {r"q_proj": 2}
    config = dataclasses.replace(CONFIG, method=method, rank_pattern=pattern, alpha=8)
    model = trained(config)
    save_adapter(model, tmp_path / "adapter", config=config)
    loaded = load_adapter(tmp_path / "adapter")
    assert {layer.r["default"] for name, layer in adapted(loaded).items() if "q_proj" in name} == {4}
    assert {layer.r["default"] for name, layer in adapted(loaded).items() if "v_proj" in name} == {8}
    torch.testing.assert_close(logits(loaded, pixels), logits(model, pixels), atol=1e-6, rtol=0)


def test_scalings():
    def scaling(**fields):
        return {layer.scaling["default"] for layer in adapted(fresh(dataclasses.replace(CONFIG, **fields))).values()}

    assert scaling(rank=16) == {1}
    assert scaling(rank=16, alpha=8) == {0.5}
    assert scaling(rank=16, method="rslora") == {0.5}  # 2 / sqrt(16)
    assert scaling(rank=16, method="rslora", alpha=4) == {1}


def test_the_file_of_biases_holds_no_others(tmp_path):
    config = dataclasses.replace(CONFIG, method="bitfit")
    save_adapter(fresh(config), tmp_path / "adapter", config=config)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        of_encoder = [name for name in file.keys() if "vision_encoder" in name]  # noqa: SIM118
        assert not any("original_module" in name for name in file.keys())  # noqa: SIM118
    assert len(of_encoder) > 50
    assert all(name.endswith(".bias") for name in of_encoder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lokr"}, "method must be one of lora, rslora"),
        ({"targets": ("qkv",)}, "targets must be some of q_proj"),
        ({"targets": ("q_proj", "q_proj")}, "targets must be some of"),
        ({"layers": (-1,)}, "layers must be numbers from 0"),
        ({"layers": (6,)}, "layers must be numbers from 0 to 5 for this base; found 6"),
        ({"rank_pattern": {"q_proj": 0}}, "ranks of at least 1"),
        ({"rank_pattern": {"q_proj(": 2}}, "must have regular expressions; found .q_proj\\("),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern must be"),
        ({"method": "ia3", "alpha": 4}, "alpha means nothing to ia3"),
        ({"method": "adalora", "rank_pattern": {"q_proj": 2}}, "rank_pattern means nothing to adalora"),
        ({"method": "full", "layers": (0,)}, "layers means nothing to full"),
        ({"method": "bitfit", "dropout": 0.1}, "dropout means nothing to bitfit"),
        ({"method": "oft", "rank": 1}, "at least 2"),
        ({"method": "oft", "decoder": "lora"}, "decoder must be full with oft"),
        ({"decoder": "lora", "targets": ("lin1",)}, "of which targets must have one"),
    ],
)
def test_options_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        fresh(dataclasses.replace(CONFIG, **fields))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.plain_lora])
def test_what_is_plain_lora_in_the_end_is_exported(method, pixels, tmp_path):
    config = dataclasses.replace(CONFIG, method=method)
    model = trained(config)
    save_adapter(model, tmp_path / "adapter", config=config)
    export_samed(tmp_path / "adapter", tmp_path / "samed.pth")
    back = read_samed(tmp_path / "samed.pth", base="tiny-sam", class_names=CONFIG.class_names, image_size=64)
    torch.testing.assert_close(logits(back, pixels), logits(model, pixels), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[({"method": m}, f"holds plain LoRA alone, found .*{m}") for m in WITHOUT_EXTRAS if not METHODS[m].plain_lora],
        ({"method": "vera"}, "found none \\(vera\\)"),
        ({"rank_pattern": {"q_proj": 2}}, "found ranks 2, 4"),
        ({"targets": ("q_proj", "lin1")}, "found some on lin1"),
    ],
)
@pytest.mark.parametrize("export", [export_samed, export_peft_fused])
def test_what_other_formats_cannot_hold_is_not_exported(fields, message, export, tmp_path):
    config = dataclasses.replace(CONFIG, **fields)
    save_adapter(fresh(config), tmp_path / "adapter", config=config)
    with pytest.raises(InputError, match=message):
        export(tmp_path / "adapter", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_lora_plus_takes_longer_steps_with_b():
    model = fresh()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(model, weight_decay=0.0, lora_plus_ratio=16.0)
    next(steps(model, optimizer, TRAINING))
    # Adam's first step is as long as the learning rate, wherever there is a gradient to speak of.
    moved = {
        name: (p.detach() - start[name]).abs().max().item() for name, p in model.named_parameters() if name in start
    }
    of_b = [value for name, value in moved.items() if ".lora_B." in name]
    others = [value for name, value in moved.items() if "mask_decoder" in name]
    assert max(of_b) == pytest.approx(16 * TRAINING.learning_rate, rel=1e-3)
    assert max(others) == pytest.approx(TRAINING.learning_rate, rel=1e-3)


@pytest.mark.parametrize("method", WITHOUT_EXTRAS)
def test_lora_plus_is_refused_by_methods_without_b(method):
    taken = "lora_plus_ratio" in METHODS[method].options
    with contextlib.nullcontext() if taken else pytest.raises(InputError, match="lora_plus_ratio means nothing"):
        build_optimizer(fresh(dataclasses.replace(CONFIG, method=method)), weight_decay=0.0, lora_plus_ratio=2.0)


TRAINING = TrainingConfig(
    learning_rate=0.002, warmup_steps=0, epochs=5, stop_epoch=5, batch_size=2, num_workers=0, seed=0, augment=False
)


def steps(model, optimizer, training, *, start=0, accelerator=None):
    rng = np.random.default_rng(0)
    rows = [
        {"image": rng.random((64, 64), np.float32), "label": rng.integers(0, 3, (64, 64), np.uint8)} for _ in range(8)
    ]
    slices = TrainingSlices(rows, SlicePreparation(64, 32))
    accelerator = accelerator or Accelerator(cpu=True)
    return training_steps(model, optimizer, slices, training=training, accelerator=accelerator, start=start)


def adalora(number_of_steps):
    model = fresh(dataclasses.replace(CONFIG, method="adalora"))
    optimizer = build_optimizer(model, weight_decay=0.1)
    prune_ranks(model, optimizer, steps=number_of_steps)
    return Accelerator(cpu=True).prepare(model, optimizer)


def test_adalora_ends_with_the_mean_rank_asked_for(pixels, tmp_path):
    model, optimizer = adalora(20)
    for _ in steps(model, optimizer, TRAINING):
        pass
    ranks = [int((layer.lora_E["default"] != 0).sum()) for layer in adapted(model).values()]
    assert len(ranks) == 12
    assert sum(ranks) == 12 * CONFIG.rank
    assert len(set(ranks)) > 1
    config = dataclasses.replace(CONFIG, method="adalora")
    save_adapter(model, tmp_path / "adapter", config=config)
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["peft_type"] == "LORA"
    loaded = load_adapter(tmp_path / "adapter")
    assert [layer.r["default"] for layer in adapted(loaded).values()] == [max(rank, 1) for rank in ranks]
    torch.testing.assert_close(logits(loaded, pixels), logits(model.eval(), pixels), atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="found ranks"):
        export_samed(tmp_path / "adapter", tmp_path / "samed.pth")


@pytest.mark.parametrize("number_of_steps", [1, 2, 4])
def test_adalora_takes_the_shortest_trainings(number_of_steps):
    model, optimizer = adalora(number_of_steps)
    short = dataclasses.replace(TRAINING, batch_size=8 if number_of_steps == 1 else 4, epochs=1, stop_epoch=1)
    if number_of_steps == 4:
        short = dataclasses.replace(short, epochs=2, stop_epoch=2)
    assert len(list(steps(model, optimizer, short))) == number_of_steps
    kept = sum(int((layer.lora_E["default"] != 0).sum()) for layer in adapted(model).values())
    assert kept == 12 * (CONFIG.rank if number_of_steps > 1 else round(1.5 * CONFIG.rank))


@pytest.mark.parametrize("method", ["dora", "pissa", "vera", "oft", "bitfit", "full"])
def test_others_resume_to_the_bit_as_well(method, tmp_path):
    config, training = dataclasses.replace(CONFIG, method=method), dataclasses.replace(TRAINING, epochs=2, stop_epoch=2)
    accelerator, found = Accelerator(cpu=True), []
    for resumed in (False, True):
        model = fresh(config)
        model, optimizer = accelerator.prepare(model, build_optimizer(model, weight_decay=0.1))
        start = load_checkpoint(tmp_path, model, optimizer, accelerator=accelerator).step if resumed else 0
        for step in steps(model, optimizer, training, start=start, accelerator=accelerator):
            if step.number == 3 and not resumed:
                save_checkpoint(tmp_path, model, optimizer, progress=Progress(3), accelerator=accelerator)
        assert start == (3 if resumed else 0)
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(tensor.equal(found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("stop", [1, 9, 17])  # before, within and after the pruning
def test_adalora_resumes_to_the_bit(stop, tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer = adalora(20)
    for step in steps(model, optimizer, TRAINING, accelerator=accelerator):
        if step.number == stop:
            save_checkpoint(tmp_path, model, optimizer, progress=Progress(stop), accelerator=accelerator)
    again, optimizer = adalora(20)
    progress = load_checkpoint(tmp_path, again, optimizer, accelerator=accelerator)
    for _ in steps(again, optimizer, TRAINING, start=progress.step, accelerator=accelerator):
        pass
    expected = dict(model.named_parameters())
    assert all(parameter.equal(expected[name]) for name, parameter in again.named_parameters())


def test_an_overflow_of_float16_prunes_no_rank():
    model = fresh(dataclasses.replace(CONFIG, method="adalora"))
    optimizer = build_optimizer(model, weight_decay=0.1)
    prune_ranks(model, optimizer, steps=20)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for infinite in (True, False):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, torch.inf if infinite else 1.0)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        gathered = allocation_tensors(model)
        assert bool(gathered) is not infinite
    assert all(tensor.isfinite().all() for tensor in gathered.values())


def test_a_run_of_a_time_before_there_were_methods_can_be_resumed(tmp_path):
    settings = CONFIG.to_dict() | TrainingConfig().to_dict()
    later = ("method", "layers", "rank_pattern", "lora_plus_ratio")
    older = {name: value for name, value in settings.items() if name not in later}
    accelerator = Accelerator(cpu=True)
    claim_run_folder(tmp_path / "run", older, resume=False, accelerator=accelerator)
    claim_run_folder(tmp_path / "run", settings, resume=True, accelerator=accelerator)
    with pytest.raises(InputError, match="method: lora there, dora now"):
        claim_run_folder(tmp_path / "run", settings | {"method": "dora"}, resume=True, accelerator=accelerator)
