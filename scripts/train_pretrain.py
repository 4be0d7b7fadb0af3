"""Entry: pre-trains PRETRAIN of scripts/config.py. `deepspeed scripts/train_pretrain.py`, or under torchrun or srun."""

import sys

from torch import Tensor

from scripts import trainer
from scripts.config import PRETRAIN, TrainingConfig, refuse_arguments, refusing
from scripts.losses import next_token_loss
from scripts.prepare_data import prepare


def pretrain(config: TrainingConfig) -> None:
    """Trains `config` to its last step, or continues it; prepares the data first where it is not there.

    Raises:
        ValueError: the configuration, the data or the run directory is refused before training.
    """
    trainer.train(_ready(config), next_token)


def next_token(engine, windows: Tensor, config: TrainingConfig) -> Tensor:
    """The pre-training objective: windows (B, T + 1) int64 -> mean nats per token, () float32."""
    hidden = engine(windows[:, :-1])
    return next_token_loss(hidden, engine.module.head, windows[:, 1:], config.loss_chunk_rows)


def _ready(config: TrainingConfig) -> trainer.Run | None:
    if config.teacher_dir is not None:
        raise ValueError(f"teacher_dir={config.teacher_dir!r} has no effect in pre-training; set teacher_dir=None")
    return trainer.ready(config, prepare)


def main() -> None:
    with refusing():
        refuse_arguments(sys.argv[1:])
        run = _ready(PRETRAIN)
    trainer.train(run, next_token)


if __name__ == "__main__":
    with trainer.leaving():
        main()
