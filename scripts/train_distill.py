"""Entry: trains DISTILL of scripts/config.py from its teacher. `deepspeed scripts/train_distill.py`, or by torchrun or srun."""

import sys

import torch
from torch import Tensor

from scripts import trainer
from scripts.config import DISTILL, TrainingConfig, refuse_arguments, refusing
from scripts.losses import Labels, distillation_loss, label_loss, likeliest
from scripts.prepare_data import prepare


def distill(config: TrainingConfig) -> None:
    """Trains the student that `config` describes from its teacher to the last step, or continues it; prepares the data first,
    and with `teacher_top_k` the teacher's labels, where they are not there.

    Raises:
        ValueError: the configuration, the teacher, the data or the run directory is refused before training.
    """
    trainer.train(_ready(config), _objective(config))


def from_teacher(engine, windows: Tensor, teacher, config: TrainingConfig) -> Tensor:
    """The objective with a teacher beside the student: windows (B, T + 1) int64 -> mean loss in nats, () float32."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    with torch.no_grad():
        taught = teacher(inputs)
    return distillation_loss(
        engine(inputs), engine.module.head, targets, taught, teacher.head, config.distill_weight, config.distill_temperature,
        config.distill_divergence, config.loss_chunk_rows,
    )  # fmt: skip


def from_labels(engine, windows: Tensor, labels: tuple[Tensor, Tensor, Tensor], config: TrainingConfig) -> Tensor:
    """The objective with a teacher's labels: windows (B, T + 1), ids and log-probabilities (B, T, k) and tails (B, T) -> ()."""
    return label_loss(
        engine(windows[:, :-1]), engine.module.head, windows[:, 1:], Labels(*labels), config.distill_weight,
        config.distill_temperature, config.distill_divergence, config.loss_chunk_rows,
    )  # fmt: skip


def label(teacher, windows: Tensor, config: TrainingConfig) -> tuple[Labels, Tensor]:
    """What the teacher says of windows (B, T + 1): its labels, and the nats that they leave out, (B, T)."""
    with torch.no_grad():
        hidden = teacher(windows[:, :-1])
    return likeliest(hidden, teacher.head, config.teacher_top_k or 0, config.distill_temperature, config.loss_chunk_rows)


def _ready(config: TrainingConfig) -> trainer.Run | None:
    if config.teacher_dir is None:
        raise ValueError("teacher_dir=None: distillation needs a teacher; name a run's folder or a Llama or Qwen3 folder")
    return trainer.ready(config, prepare, label)


def _objective(config: TrainingConfig) -> trainer.Objective:
    return from_teacher if config.teacher_top_k is None else from_labels


def main() -> None:
    with refusing():
        refuse_arguments(sys.argv[1:])
        run = _ready(DISTILL)
    trainer.train(run, _objective(DISTILL))


if __name__ == "__main__":
    with trainer.leaving():
        main()
