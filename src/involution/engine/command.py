"""The LightningCLI behind `involution fit | validate | test`, the same for every task."""

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from .checkpoints import AtomicCheckpointIO, check_importable, content_of, last_checkpoint
from .console import Screen, on_a_terminal, quiet_lightning, result_of
from .curves import Curves
from .finite_loss import FiniteLoss
from .progress import OneLine
from .recipes import resolve_configs
from .resume import BestCheckpoint, EpochCounterFix, GivenOptions
from .samples import Samples
from .sampling import RandomStates
from .sync_batch_norm import SyncBatchNorms
from .trainer_options import check_trainer_options


class TaskCLI(LightningCLI):
    """LightningCLI with this project's defaults.

    Besides LightningCLI's arguments there are `checkpoint`, the ModelCheckpoint that writes best.ckpt (by
    `checkpoint.monitor`; without it, the latest), and `recovery`, which writes last.ckpt every
    `recovery.every_n_train_steps` steps; last.ckpt is also written after every epoch. `--ckpt_path last` resumes from
    the newest last.ckpt below `trainer.default_root_dir`, with the same data order, random numbers and best score. The
    model's num_classes comes from the data. Each run writes to a new `version_N` in the trainer's default_root_dir:
    config.yaml, metrics.csv, curves.png, TensorBoard events with sample predictions, checkpoints.
    """

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """LightningCLI's, without its warning about `args` together with sys.argv: the dispatcher passes both."""
        self.config = parser.parse_args(args)
        self._arguments = list(args or [])

    def _parse_ckpt_path(self) -> None:
        """Precedence of hyperparameters: the command line, then the checkpoint, then the config."""
        verb = self.config.subcommand
        config = self.config[verb]
        if config.get("ckpt_path") == "last":
            config.ckpt_path = str(last_checkpoint(Path(config.trainer.default_root_dir)))
        checkpoint = Path(config.get("ckpt_path") or "")
        before = _hyperparameters(config)
        if checkpoint.is_file():
            _check_named_class(checkpoint)
        super()._parse_ckpt_path()
        given = _model_options(self._arguments)
        if verb == "fit" and checkpoint.is_file():
            given = _without_initial_weights(given, checkpoint)
        if given:
            self.config = self.parser.parse_args([verb, *given], namespace=self.config)
        if verb == "fit" and checkpoint.is_file():
            now = _hyperparameters(self.config[verb])
            for name in [name for name in now if name in before and now[name] != before[name]]:
                if not _is_given(name, given):
                    rank_zero_info(
                        f"model.{name} is {now[name]!r}, as in the checkpoint, and not {before[name]!r}, as in the "
                        f"config; --model.{name} on the command line changes it"
                    )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `checkpoint` and `recovery`, and takes the number of classes from the data."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.filename": "best"})
        parser.add_lightning_class_args(ModelCheckpoint, "recovery")
        recovery = {"filename": "last", "every_n_train_steps": 500, "enable_version_counter": False}
        parser.set_defaults({f"recovery.{name}": value for name, value in recovery.items()})
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Logs to CSV and TensorBoard unless `trainer.logger` is given; checkpoints are written atomically."""
        trainer = self.config[self.subcommand]["trainer"]
        check_trainer_options(trainer)
        plugins = trainer["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        plugins = [*plugins, AtomicCheckpointIO()]
        if trainer["sync_batchnorm"]:
            on_cpu = trainer["accelerator"] == "cpu" or not torch.accelerator.is_available()
            plugins.append(SyncBatchNorms(on_cpu))
            kwargs["sync_batchnorm"] = False  # Lightning's conversion loses the activations of timm's norms
        kwargs["plugins"] = plugins
        if trainer["logger"] in (None, True):
            kwargs["logger"] = _loggers(Path(trainer["default_root_dir"]))
        if trainer["enable_progress_bar"] is None:
            kwargs["enable_progress_bar"] = on_a_terminal()
        if kwargs.get("enable_progress_bar", trainer["enable_progress_bar"]) and not self._has_progress_bar():
            self.trainer_defaults["callbacks"].append(OneLine())
        try:
            return super().instantiate_trainer(**kwargs)
        except TypeError as error:
            if not str(error).startswith("`devices`"):  # -1 on a CPU
                raise
            raise ValueError(f"trainer.devices: {error}, got {trainer['devices']!r}") from error

    def _has_progress_bar(self) -> bool:
        """Whether trainer.callbacks of the configuration has one."""
        given = self.config_init[self.subcommand]["trainer"]["callbacks"] or []
        return any(isinstance(one, ProgressBar) for one in (given if isinstance(given, list) else [given]))

    def after_fit(self) -> None:
        """Prints the best score, its checkpoint and the next commands."""
        config = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "config.yaml"  # a collective operation
        if self.trainer.is_global_zero:
            verb = "test" if getattr(self.datamodule, "can_test", True) else "validate"
            print(*result_of(self.trainer, str(config), verb), sep="\n")


def _check_named_class(checkpoint: Path) -> None:
    """Refuses a checkpoint whose hyperparameters name a class that must not be imported: see `check_importable`.

    Raises:
        ValueError: it names one; or the file is no checkpoint, or asks for code.
    """
    with content_of(checkpoint, "ckpt_path") as content:
        name = content.get("hyper_parameters", {}).get("_class_path")
    if name is not None:
        check_importable(str(name), f"ckpt_path {checkpoint}")


def _model_options(arguments: list[str]) -> list[str]:
    """The arguments that start with --model., with their values."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--model."):
            found += [argument] if "=" in argument else [argument, following]
    return found


def _is_given(name: str, arguments: list[str]) -> bool:
    """Whether an option of the model, or a part of it, is among the arguments."""
    return any(re.match(rf"--model\.(init_args\.)?{re.escape(name)}([.=]|$)", argument) for argument in arguments)


def _hyperparameters(config: Any) -> dict[str, Any]:
    """The model's hyperparameters in a verb's config, without its initial weights and what comes from the data."""
    arguments = (config.get("model") or {}).get("init_args") or {}
    left_out = ("backbone_weights", "init_from", "num_classes")
    return {name: value for name, value in dict(arguments).items() if name not in left_out}


def _without_initial_weights(given: list[str], checkpoint: Path) -> list[str]:
    """The options without --model.backbone_weights and --model.init_from, which a resumed run no longer needs.

    Raises:
        ValueError: the checkpoint's run started from other weights.
    """
    kept: list[str] = []
    with content_of(checkpoint, "ckpt_path") as content:
        begun = {
            "backbone_weights": content.get("involution", {}).get("backbone_weights"),
            "init_from": content.get("hyper_parameters", {}).get("init_from"),
        }
    arguments = iter(given)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        value = value if equals else next(arguments)
        option = name.removeprefix("--model.").removeprefix("init_args.")
        if option not in begun:
            kept += [name, value]
        elif value != begun[option]:
            raise ValueError(
                f"{option} must be {begun[option]!r}, with which the run of {checkpoint} began, or left out, got "
                f"{value!r}; to start from other weights, leave out ckpt_path"
            )
    return kept


def _loggers(folder: Path) -> list[Logger]:
    """CSV and TensorBoard loggers that share one `version_N`; by default each would count its own."""
    csv = CSVLogger(folder, name="", flush_logs_every_n_steps=20)
    return [csv, TensorBoardLogger(folder, name="", version=csv.version, default_hp_metric=False)]


def run(arguments: list[str]) -> TaskCLI:
    """Runs one verb.

    Args:
        arguments: the verb (fit, validate, test), then LightningCLI's arguments. `-c` also takes the name of a
            packaged recipe; the run then writes to runs/<that name>.

    Returns:
        The finished LightningCLI, with `.trainer`, `.model` and `.datamodule`.

    Raises:
        ValueError: a config is neither a file nor a recipe; num_classes is given, which the data define.
        FloatingPointError: the loss or a weight is not finite.
        SystemExit: an argument is wrong (jsonargparse's message is on stderr).
    """
    quiet_lightning()
    resolved, name = resolve_configs(arguments)
    for argument in resolved:
        if argument.partition("=")[0] in ("--model.num_classes", "--model.init_args.num_classes"):
            raise ValueError(f"num_classes comes from the data, got {argument}")
    # ModelCheckpoint's save_last writes only together with a best one, so last.ckpt has a callback of its own.
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    callbacks = [last, RandomStates(), EpochCounterFix(), GivenOptions(), FiniteLoss(), Screen(), Curves(), Samples()]
    finished = TaskCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "default_root_dir": f"runs/{name or 'unnamed'}",
            "callbacks": callbacks,
            "enable_model_summary": False,
        },
        parser_kwargs={"prog": "involution"},
        args=resolved,
    )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # gloo's threads may still hold Python objects, and requesting the GIL while the interpreter shuts down aborts
        # the process. Lightning destroys NCCL's groups only.
        torch.distributed.destroy_process_group()
    return finished
