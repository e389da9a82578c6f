"""AdaLoRA's share-out of ranks in training (arXiv 2303.10512), by PEFT's allocator; resumable to the bit."""

import torch
from peft import AdaLoraModel
from torch import Tensor, nn

START_SHARE, END_SHARE = 0.1, 0.3
"""Shares of all steps before the first rank is given up and after the last one was."""


def _tuner(model: nn.Module) -> AdaLoraModel | None:
    """PEFT's AdaLoRA within a model, with or without the wrapper of data-parallel training; None for other methods."""
    return next((module for module in model.modules() if isinstance(module, AdaLoraModel)), None)


def share_out_ranks(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int) -> None:
    """Have ranks given up after steps of an optimizer, so that the mean rank falls from 1.5 times to the one asked for.

    Nothing is done for other methods than AdaLoRA, nor in a single step, which has nothing to go by.

    Args:
        model: from `add_lora`, prepared or not.
        optimizer: over its trainable weights, as it was before it was prepared.
        steps: of the whole training, those before a resumption included.
    """
    tuner = _tuner(model)
    if tuner is None or steps < 2:
        return
    settings = tuner.peft_config["default"]
    settings.total_step = steps
    settings.tinit, settings.tfinal = int(START_SHARE * steps), int(END_SHARE * steps)
    counted = optimizer.param_groups[0]["params"][0]
    before = 0

    def done(stepping: torch.optim.Optimizer) -> int:
        return int(stepping.state[counted].get("step", 0))

    def before_step(stepping: torch.optim.Optimizer, *_: object) -> None:
        nonlocal before
        before = done(stepping)

    def after_step(stepped: torch.optim.Optimizer, *_: object) -> None:
        # A step that float16 overflowed in changes no weight, and its gradients would spoil what is gathered.
        if done(stepped) > before:
            tuner.update_and_allocate(done(stepped))

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


def orthogonality(model: nn.Module) -> Tensor | None:
    """AdaLoRA's penalty on A and B that are not orthogonal; None for other methods."""
    tuner = _tuner(model)
    if tuner is None:
        return None
    distances = []
    for name, weight in tuner.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = weight @ weight.T if ".lora_A." in name else weight.T @ weight
            distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
    penalty: Tensor = tuner.peft_config["default"].orth_reg_weight * torch.stack(distances).mean()
    return penalty


def allocation_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the allocator has gathered so far; empty for other methods."""
    tuner = _tuner(model)
    if tuner is None:
        return {}
    allocator = tuner.rankallocator
    kinds = {"ipt": allocator.exp_avg_ipt, "unc": allocator.exp_avg_unc}
    tensors = {f"{name}|{kind}": tensor for kind, held in kinds.items() for name, tensor in held.items()}
    ranks = tuner.peft_config["default"].rank_pattern or {}
    return tensors | {f"{name}|ranks": torch.tensor(kept) for name, kept in ranks.items()}


def restore_allocation(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Take up what `allocation_tensors` gave."""
    tuner = _tuner(model)
    if tuner is None:
        return
    allocator, settings = tuner.rankallocator, tuner.peft_config["default"]
    device = next(tuner.parameters()).device
    ranks = {}
    for key, tensor in tensors.items():
        name, kind = key.rsplit("|", 1)
        if kind == "ranks":
            ranks[name] = tensor.tolist()
        elif kind == "ipt":
            allocator.exp_avg_ipt[name] = tensor.to(device)
            allocator.ipt[name] = torch.zeros_like(tensor, device=device)  # made anew in each step
        else:
            allocator.exp_avg_unc[name] = tensor.to(device)
    settings.rank_pattern = ranks or None
