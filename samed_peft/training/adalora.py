"""Prune AdaLoRA's ranks during training (arXiv 2303.10512) by PEFT's allocator; resumable to the bit."""

import torch
from peft import AdaLoraModel
from torch import Tensor, nn

START_SHARE, END_SHARE = 0.1, 0.3
"""Shares of all steps before the first rank is pruned and until the last one is."""


def _tuner(model: nn.Module) -> AdaLoraModel | None:
    """PEFT's AdaLoRA within a model, data-parallel or not; None for other methods and for AdaLoRA loaded as LoRA."""
    return next((module for module in model.modules() if isinstance(module, AdaLoraModel)), None)


def prune_ranks(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int) -> None:
    """Prune ranks after steps of an optimizer until the mean rank falls from 1.5 times `rank` to `rank`.

    Does nothing for methods other than AdaLoRA, nor for a single step, which has no past gradients. The optimizer must
    not be prepared yet; `steps` are those of the whole training, before a resumption too.
    """
    tuner = _tuner(model)
    if tuner is None or steps < 2:
        return
    schedule = tuner.peft_config["default"]
    schedule.total_step = steps
    schedule.tinit, schedule.tfinal = int(START_SHARE * steps), int(END_SHARE * steps)
    counted = optimizer.param_groups[0]["params"][0]
    before = 0

    def done(stepping: torch.optim.Optimizer) -> int:
        return int(stepping.state[counted].get("step", 0))

    def before_step(stepping: torch.optim.Optimizer, *_: object) -> None:
        nonlocal before
        before = done(stepping)

    def after_step(stepped: torch.optim.Optimizer, *_: object) -> None:
        # After an overflow of float16 no weight has changed, and the gradients would spoil the averages.
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
    """The allocator's averages and ranks so far; empty for other methods."""
    tuner = _tuner(model)
    if tuner is None:
        return {}
    allocator = tuner.rankallocator
    kinds = {"ipt": allocator.exp_avg_ipt, "unc": allocator.exp_avg_unc}
    tensors = {f"{name}|{kind}": tensor for kind, averages in kinds.items() for name, tensor in averages.items()}
    ranks = tuner.peft_config["default"].rank_pattern or {}
    return tensors | {f"{name}|ranks": torch.tensor(kept) for name, kept in ranks.items()}


def restore_allocation(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore the tensors of `allocation_tensors`."""
    tuner = _tuner(model)
    if tuner is None:
        return
    allocator = tuner.rankallocator
    device = next(tuner.parameters()).device
    ranks = {}
    for key, tensor in tensors.items():
        name, kind = key.rsplit("|", 1)
        if kind == "ranks":
            ranks[name] = tensor.tolist()
        elif kind == "ipt":
            allocator.exp_avg_ipt[name] = tensor.to(device)
            allocator.ipt[name] = torch.zeros_like(tensor, device=device)  # computed anew in each step
        else:
            allocator.exp_avg_unc[name] = tensor.to(device)
    tuner.peft_config["default"].rank_pattern = ranks or None
