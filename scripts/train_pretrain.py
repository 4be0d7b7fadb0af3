"""Entry: pre-trains PRETRAIN of scripts/config.py. `deepspeed scripts/train_pretrain.py`, or under torchrun or srun."""

import sys

from scripts.config import PRETRAIN, TrainingConfig, refuse_arguments, refusing
from scripts.engine.distributed import leaving
from scripts.model.losses import next_token
from scripts.prepare_data import prepare
from scripts.run.state import Run
from scripts.trainer import set_up, train


def pretrain(config: TrainingConfig) -> None:
    """Trains `config` to its last step, or continues it; prepares the data first where it is not there.

    Raises:
        ValueError: the configuration, the data or the run directory is refused before training.
    """
    train(_set_up(config), next_token)


def _set_up(config: TrainingConfig) -> Run | None:
    if config.teacher_dir is not None:
        raise ValueError(f"teacher_dir={config.teacher_dir!r} has no effect in pre-training; set teacher_dir=None")
    return set_up(config, prepare)


def main() -> None:
    """The command: refuses arguments, then trains PRETRAIN."""
    with refusing():
        refuse_arguments(sys.argv[1:])
        run = _set_up(PRETRAIN)
    train(run, next_token)


if __name__ == "__main__":
    with leaving():
        main()
