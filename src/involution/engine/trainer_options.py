"""Numbers of `--trainer.*` that make no sense, and that Lightning accepts or fails on in the midst of a run."""

from collections.abc import Mapping
from typing import Any

_MINIMA = {
    "gradient_clip_val": 0,  # 0 does not clip
    "log_every_n_steps": 0,  # 0 logs no steps
    "min_epochs": 0,
    "min_steps": 0,
    "check_val_every_n_epoch": 1,
    "accumulate_grad_batches": 1,
    "num_sanity_val_steps": -1,  # all batches
}


def check_trainer_options(trainer: Mapping[str, Any]) -> None:
    """Checks the options of Lightning's Trainer that are numbers; what it checks itself is left to it.

    Raises:
        ValueError: a number is too small, or a minimum is above its maximum.
    """
    for name, minimum in _MINIMA.items():
        value = trainer.get(name)
        if value is not None and value < minimum:
            raise ValueError(f"trainer.{name} must be at least {minimum}, got {value!r}")
    if trainer.get("val_check_interval") == 0:
        raise ValueError(
            f"trainer.val_check_interval must be above 0, got {trainer['val_check_interval']!r}; "
            "trainer.limit_val_batches 0 turns validation off"
        )
    for unit in ("epochs", "steps"):
        least, most = trainer.get(f"min_{unit}"), trainer.get(f"max_{unit}")
        if least is not None and most not in (None, -1) and least > most:
            raise ValueError(f"trainer.min_{unit} must be at most max_{unit}, which is {most}, got {least}")
