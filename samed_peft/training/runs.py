"""Start, record and finish a training run: its processes, folder, log and scores."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset

from samed_peft.adapters.save_load import write_card
from samed_peft.config import TINY_SAM, TINY_SAM_NOTE, SamedConfig, TrainingConfig
from samed_peft.datasets import CaseVolumes, LabelledFolder, Splits
from samed_peft.errors import InputError, RunInterruptedError, StopSignal, printable
from samed_peft.evaluation import Report, format_table
from samed_peft.hub.push import check_repo_id, push_to_hub
from samed_peft.io import Volume, require_replaceable
from samed_peft.models.launch import check_launch
from samed_peft.training.batch_trial import recorded_batch
from samed_peft.training.claims import RUN_FOLDER
from samed_peft.training.length import LengthRecord
from samed_peft.training.planning import PLAN_FILE, Plan, write_plan
from samed_peft.training.replanning import settled
from samed_peft.training.state import stop_on_any_process

_WITHOUT_EFFECT = ("num_workers", "checkpoint_steps", "channel_files")
"""Fields that do not change the result, so they may differ when a run resumes."""


@dataclass(frozen=True)
class Run:
    """One training: which adapter, on which data, in which folder.

    Attributes:
        config: the adapter to train.
        training: how to train it.
        rows: training slices, from `load_synapse` or `load_slices`.
        output_dir: gets `adapter`, `adapter_best` if there is a validation, `checkpoints`, `logs`, `run.json`,
            `resources.json`, `batch.json` if a planned batch was tried, and `length.json` if the number of steps was
            fitted to minutes or exceeded later.
        folder: the labelled scans.
        cases: names of its cases to train, test and validate on.
        init: folder or Hub id of an adapter whose training goes on, in place of a fresh one; None for none.
        plan: that config and training follow, kept with run and adapter; None for none.
    """

    config: SamedConfig
    training: TrainingConfig
    rows: Dataset
    output_dir: Path
    folder: LabelledFolder
    cases: Splits
    init: str | Path | None = None
    plan: Plan | None = None

    @property
    def data(self) -> tuple[str, ...]:
        """Names of all data that decide the result, with fingerprints of their files, for `run.json`."""
        return self.rows.config_name, *self.folder.held_out_names(self.cases.test, self.cases.validation)

    @property
    def test(self) -> tuple[Mapping[str, Volume], Mapping[str, Volume]]:
        """Scans and references to test on, read from their files on access."""
        return CaseVolumes.of_folder(self.folder, self.cases.test)

    @property
    def validation(self) -> tuple[Mapping[str, Volume], Mapping[str, Volume]] | None:
        """Scans and references to validate on, or None."""
        return CaseVolumes.of_folder(self.folder, self.cases.validation) if self.cases.validation else None


def start_run(output_dir: Path, *, mixed_precision: str | None = None, repo_id: str | None = None) -> Accelerator:
    """Check where a run will write, and set up its processes.

    Args:
        output_dir: folder of the run; it may hold an earlier state of it, and is not changed yet.
        mixed_precision: "no", "fp16" or "bf16"; None for Accelerate's setting.
        repo_id: repository of the Hub that the adapter will be pushed to, if any.

    Raises:
        InputError: the folder cannot be written or holds other files, `repo_id` is malformed, or Accelerate is set up
            to split one model over processes or to compute in fp16 without a GPU.
    """
    if repo_id:
        check_repo_id(repo_id)
    require_replaceable(output_dir, RUN_FOLDER)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    require_replicas(accelerator)
    check_launch(accelerator)
    return accelerator


def verifies_rows(accelerator: Accelerator) -> bool:
    """Whether this process has to verify prepared rows: not if the main process has done so on the same machine.

    The main process must have opened them before, as within `Accelerator.main_process_first`.
    """
    return accelerator.is_main_process or accelerator.process_index != accelerator.local_process_index


def finish_run(
    run: Run, adapter: Path, report: Report | None, *, accelerator: Accelerator, repo_id: str | None = None
) -> None:
    """Put the scores into the adapter's card, print them, push the adapter if asked to, and end the processes.

    Args:
        run: the run.
        adapter: folder of the adapter, from `fit`.
        report: its scores, from `score_held_out`: None on all processes but the main one, and if none was scored.
        accelerator: from `start_run`.
        repo_id: repository of the Hub to push the adapter to, or None.

    Raises:
        InputError: the Hub cannot be reached or refuses.
        SomeCasesFailedError: cases failed; the rest is done, but the adapter is not pushed.
    """
    refusal = None
    if accelerator.is_main_process:
        if run.plan is not None:
            length = LengthRecord.read(run.output_dir)
            steps = length.max_steps or 0
            plan = settled(run.plan, length.decisions, steps=steps) if length.decisions else run.plan
            write_plan(plan, adapter / PLAN_FILE)
        training = LengthRecord.read(run.output_dir).settled(run.training)
        training = dataclasses.replace(training, **recorded_batch(run.output_dir))
        if report is not None:
            write_card(adapter, report=report, training=training)
            print(
                format_table(report),
                printable(f"adapter, masks, report and pictures are in {run.output_dir}"),
                sep="\n",
            )
        else:
            write_card(adapter, training=training)
            print(printable(f"the adapter is in {adapter}; it has no scores, since no case was held out"))
        if repo_id and not (report and report.settings.get("failed_cases")):
            try:
                print(printable(push_to_hub(adapter, repo_id)))
            except InputError as error:
                refusal = error
    _agree_on_the_end(accelerator)
    accelerator.end_training()
    if refusal is not None:
        raise refusal
    if report is not None:
        report.require_all_cases()


def _agree_on_the_end(accelerator: Accelerator) -> None:
    """Wait until the results are whole: a signal to one process ends all before, and none afterwards."""
    with StopSignal() as stop:
        if stop_on_any_process(stop, accelerator):
            raise RunInterruptedError("stopped by a signal at the very end; all results are written")
        StopSignal.results_are_whole()


def require_replicas(accelerator: Accelerator) -> None:
    """Refuse set-ups that split one model over processes: checkpoints and adapters are read from a whole one.

    Raises:
        InputError: FSDP, DeepSpeed or the like is configured.
    """
    split = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in split:
        raise InputError(
            f"expected one process or data-parallel ones, found {accelerator.distributed_type.value} in Accelerate's "
            "configuration; the model fits on each device, so launch with --multi_gpu instead"
        )


def run_settings(
    config: SamedConfig, training: TrainingConfig, *, data: Sequence[str], accelerator: Accelerator
) -> dict[str, Any]:
    """Everything that decides a run's result, as JSON values.

    Args:
        config: the adapter to train.
        training: how to train it.
        data: names of the data, with fingerprints of their files.
        accelerator: its number of processes and precision count too.
    """
    fields = config.to_dict() | training.to_dict()
    note = {"note": TINY_SAM_NOTE} if config.base == TINY_SAM else {}
    return {
        **note,
        **{name: value for name, value in fields.items() if name not in _WITHOUT_EFFECT},
        "data": list(data),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
