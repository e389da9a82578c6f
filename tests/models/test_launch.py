"""Set-ups of Accelerate that cannot work, or that work otherwise than they look."""

import os
import subprocess
import sys

import pytest
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from samed_peft.errors import InputError
from samed_peft.models.launch import check_launch
from samed_peft.models.precision import product_dtype


@pytest.fixture
def accelerate(monkeypatch):
    """Makes an Accelerator on the CPU, under the variables of the environment given."""

    def make(mixed_precision=None, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, mixed_precision=mixed_precision)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("option", "variables"), [("fp16", {}), (None, {"ACCELERATE_MIXED_PRECISION": "fp16"})])
def test_fp16_without_a_gpu_is_refused(accelerate, option, variables):
    accelerator = accelerate(option, **variables)
    for use in (check_launch, product_dtype):
        with pytest.raises(InputError, match=r"a GPU for fp16, .* --mixed_precision no or bf16, .* --preset samed_h"):
            use(accelerator)
    assert str(product_dtype(accelerator, "float16")) == "torch.float16"  # PyTorch's own autocast has it
    check_launch(accelerate("bf16"))


def test_one_process_in_place_of_several_is_told(accelerate):
    for count in (1, 2):
        args = launch_command_parser().parse_args(["--num_processes", str(count), "recipe.py"])
        args.num_machines, args.mixed_precision, args.dynamo_backend, args.use_cpu = 1, "no", "no", False
        _, environment = prepare_simple_launcher_cmd_env(args)
        accelerator = accelerate(**{key: value for key, value in environment.items() if key not in os.environ})
        if count == 1:
            check_launch(accelerator)
        else:
            with pytest.warns(UserWarning, match="starts one, .* ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2"):
                check_launch(accelerator)


@pytest.mark.slow
def test_accelerate_launch_of_two_on_a_cpu_is_told(tmp_path):
    script = tmp_path / "one.py"
    script.write_text(
        "from accelerate import Accelerator\nfrom samed_peft.models.launch import check_launch\n"
        "accelerator = Accelerator()\ncheck_launch(accelerator)\n"
        "print(f'{accelerator.num_processes}\\n', end='', flush=True)\n"  # in one write, as both write at once
    )
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    for launcher, count, told in (
        (["accelerate.commands.launch", "--num_processes", "2"], ["1"], True),
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], ["2", "2"], False),
    ):
        variables = hidden | ({} if told else {"ACCELERATE_USE_CPU": "true"})
        done = subprocess.run(
            [sys.executable, "-m", *launcher, str(script)],
            capture_output=True, encoding="utf-8", check=True, env=variables, timeout=120,
        )  # fmt: skip
        assert done.stdout.split() == count
        assert ("accelerate launch was told" in done.stderr) == told
