"""`--callbacks fastmtp_keep_mtp`: stock ms-swift trains or merges a model, and its MTP layers are not lost.

Nothing else of the plugin takes part: the model is ms-swift's own. Each full checkpoint is completed as soon as it is
saved, by the process that saves, before older ones are removed and before anything is uploaded. `swift export
--merge_lora true` does the same with the merged model.
"""

from pathlib import Path
from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map
from swift.utils import get_logger, is_master

from ..errors import FastMTPError, detail
from ..export.keep import Layers, find_layers, is_adapter, keep_layers
from .compat_swift import MERGE_LORA, after_saving, print_errors_as_lines, wrap
from .keep_asked import KEEP, keeps_mtp

logger = get_logger()


class KeepMTP(TrainerCallback):
    """Completes every full checkpoint of a run with the base's MTP layers.

    A layer that cannot be kept stops the run before it begins. A fault after that is one error line; training goes on,
    the checkpoint stays as ms-swift saved it, and the finished run ends with that error.
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        self.faults: list[str] = []
        self.noted: set[str] = set()
        if trainer.model_meta.model_type == "fastmtp":
            self._note(f"{KEEP}: --model_type fastmtp trains the MTP layer and saves it; there is nothing else to keep")
            return
        if args.use_flash_ckpt:
            raise FastMTPError(f"--callbacks {KEEP} does not work with --use_flash_ckpt: its files are not safetensors")
        base = trainer.model_info.model_dir
        self.layers = find_layers(base)
        self._note(_first_line(base, self.layers))
        if self.layers:
            after_saving(trainer, self._keep)

    def _keep(self, folder: Path) -> None:
        assert self.layers
        if is_adapter(folder):
            self._note(
                f"{KEEP}: checkpoints hold an adapter only and stay as they are; the merged model keeps the layer"
            )
            return
        try:
            line = keep_layers(self.layers, folder)
        except Exception as error:  # noqa: BLE001 (whatever it is, hours of training go on)
            line = str(error) if isinstance(error, FastMTPError) else f"{folder}: {detail(error)}"
            self.faults.append(line)
            logger.error(f"{KEEP}: the MTP layer is not in this checkpoint. {line}")
            return
        self._note(f"{KEEP}: {line}")

    def _note(self, line: str) -> None:
        if is_master() and line not in self.noted:
            self.noted.add(line)
            logger.info(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.faults:
            number = len(self.faults)
            raise FastMTPError(
                f"--callbacks {KEEP}: training is finished and saved, but {number} "
                f"{'checkpoint is' if number == 1 else 'checkpoints are'} without the MTP layer ({self.faults[-1]}); "
                "`fastmtp graft` puts it in"
            )


def _first_line(base: str, layers: Layers | None) -> str:
    if layers is None:
        return f"{KEEP}: {base} has no MTP layer that this package knows; there is nothing to keep"
    return f"{KEEP}: {layers.summary} go into every full checkpoint"


def register_keep() -> None:
    """The callback, and the merge. Again, it changes nothing."""
    print_errors_as_lines()
    callbacks_map[KEEP] = KeepMTP
    wrap(MERGE_LORA, _merge_and_keep)


def _merge_and_keep(original: Any) -> Any:
    def merge_lora(args: Any, *more: Any, **options: Any) -> Any:
        if not keeps_mtp(args) or args.model_type == "fastmtp":
            return original(args, *more, **options)
        base = args.model_dir  # afterwards it is the merged model's
        layers = find_layers(base)
        result = original(args, *more, **options)
        if layers is None:
            logger.info(_first_line(base, layers))
            return result
        try:
            line = keep_layers(layers, args.model_dir)
        except FastMTPError as error:
            raise FastMTPError(f"{args.model_dir} is merged, but without the MTP layer: {error}") from None
        logger.info(f"{KEEP}: {line}")
        return result

    return merge_lora
