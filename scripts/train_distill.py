"""Entry: trains DISTILL of scripts/config.py from its teacher. `deepspeed scripts/train_distill.py`, or by torchrun or srun."""

import sys

import torch
from torch import Tensor

from ds.shards import Labels
from scripts.config import DISTILL, TrainingConfig, refuse_arguments, refusing
from scripts.engine.distributed import leaving
from scripts.model.documents import Windows
from scripts.model.losses import LabelledTokens, distillation_loss, label_loss, likeliest
from scripts.prepare_data import prepare
from scripts.run.state import Run
from scripts.trainer import Objective, set_up, train


def distill(config: TrainingConfig) -> None:
    """Trains the student that `config` describes from its teacher to the last step, or continues it.

    Prepares the data first, and with `teacher_top_k` the teacher's labels, where they are not there.

    Raises:
        ValueError: the configuration, the teacher, the data or the run directory is refused before training.
    """
    train(_set_up(config), objective_of(config))


def objective_of(config: TrainingConfig) -> Objective:
    """The objective of a distillation: `from_teacher`, or `from_labels` with `teacher_top_k`."""
    return from_teacher if config.teacher_top_k is None else from_labels


def from_teacher(engine, windows: Windows, teacher, config: TrainingConfig) -> Tensor:
    """The objective with a teacher beside the student, both with the same documents: windows of T + 1 tokens -> mean loss in
    nats, () float32.
    """
    with torch.no_grad():
        teacher_hidden = teacher(windows.inputs, documents=windows.documents)
    hidden, head = engine(windows.inputs, documents=windows.documents), engine.module.head
    return distillation_loss(
        hidden, head, windows.targets, teacher_hidden, teacher.head, weight=config.distill_weight,
        temperature=config.distill_temperature, divergence=config.distill_divergence, chunk_rows=config.loss_chunk_rows,
    )  # fmt: skip


def from_labels(engine, windows: Windows, labels: Labels[Tensor], config: TrainingConfig) -> Tensor:
    """The objective with a teacher's labels: windows of T + 1 tokens, labels of (B, T) tokens -> mean loss in nats, ()."""
    hidden = engine(windows.inputs, documents=windows.documents)
    return label_loss(
        hidden, engine.module.head, windows.targets, labels, weight=config.distill_weight,
        temperature=config.distill_temperature, divergence=config.distill_divergence, chunk_rows=config.loss_chunk_rows,
    )  # fmt: skip


def label(teacher, windows: Windows, config: TrainingConfig) -> LabelledTokens:
    """A teacher's labels of windows of T + 1 tokens, and the nats that they leave out, (B, T) float32."""
    with torch.no_grad():
        hidden = teacher(windows.inputs, documents=windows.documents)
    return likeliest(hidden, teacher.head, config.teacher_top_k or 0, config.distill_temperature, config.loss_chunk_rows)


def _set_up(config: TrainingConfig) -> Run | None:
    if config.teacher_dir is None:
        raise ValueError("teacher_dir=None: distillation needs a teacher; name a run's folder or a Llama or Qwen3 folder")
    return set_up(config, prepare, label)


def main() -> None:
    """The command: refuses arguments, then trains DISTILL."""
    with refusing():
        refuse_arguments(sys.argv[1:])
        run = _set_up(DISTILL)
    train(run, objective_of(DISTILL))


if __name__ == "__main__":
    with leaving():
        main()
