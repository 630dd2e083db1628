"""Training that is killed and resumed: a checkpoint is whole or not there, and no step is taken twice.

transformers writes a dozen files into `checkpoint-N`, from all ranks. Here they go into a hidden folder beside it; when
every rank has written, the files are flushed to disk and the folder is renamed, once. Older checkpoints are removed
after that. A checkpoint of other versions, or of a copy that was cut off, is told by its files.
"""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from swift.utils import get_logger, is_local_master, is_master
from swift.utils.utils import check_json_format
from transformers.trainer_utils import sort_checkpoints

from ..checkpoint.finite import check_trained
from ..checkpoint.headers import read_header
from ..errors import FastMTPError, cannot_write
from ..files.staging import LOCK, discard, flush, lock_file, remove_at_once, take_away_if_dead
from .compat_swift import is_full_disk, link_last_checkpoint, push_checkpoint, run_folder, saving_into

logger = get_logger()

_STATE = "trainer_state.json"
_STEP = re.compile(r"checkpoint-(\d+)")
_HIDDEN = re.compile(r"\.checkpoint-\d+\.(?:\w{8}\.)?tmp")
"""Of a checkpoint that was being written, or removed."""
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "latest", "optimizer_*")
"""One of these holds the optimizer's state: of one process or DDP, of FSDP, of DeepSpeed (the name of a folder), of
sharded FSDP."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
_OF_A_PROCESS = {
    *("resume_from_checkpoint", "training_args", "ckpt_dir", "device_map", "max_memory"),
    *("output_dir", "logging_dir", "run_name", "add_version", "rank", "local_rank"),
}
"""Arguments that differ between a run and the same run resumed."""


def choose_checkpoint(args: Any) -> None:
    """`--resume_from_checkpoint` may name a checkpoint or the run's folder, of which the newest whole one is taken.

    Raises `FastMTPError` for one that is not whole, with the newest beside it that is.
    """
    named = getattr(args, "resume_from_checkpoint", None)
    if not named or args.model_type != "fastmtp":
        return
    folder, weights_only = Path(named), bool(args.resume_only_model)
    if _checkpoints(folder) and not (folder / _STATE).exists():
        chosen = _newest_whole(folder, weights_only)
        if chosen is None:
            raise FastMTPError(
                f"--resume_from_checkpoint {folder}: holds no whole checkpoint; remove its checkpoint-* folders, and "
                "start without this option"
            )
        logger.info(f"--resume_from_checkpoint {folder}: the newest whole checkpoint is {chosen.name}")
    else:
        chosen = folder
        if fault := what_is_missing(folder, weights_only):
            newest = _newest_whole(folder.resolve().parent, weights_only)
            how = f"resume from {newest}" if newest else "no checkpoint beside it is whole: start without this option"
            raise FastMTPError(f"--resume_from_checkpoint {folder}: not a whole checkpoint ({fault}); {how}")
    args.resume_from_checkpoint = str(chosen)
    args.adapters = [str(chosen) if name == named else name for name in args.adapters]
    if args.model == named:
        args.model = str(chosen)


def what_is_missing(checkpoint: Path, weights_only: bool = False) -> str | None:
    """What keeps a run from going on exactly from a checkpoint; None if nothing does.

    Files that were cut off are noticed, changed bytes inside them are not. `weights_only`: the optimizer's state is not
    needed.
    """
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        int(state["global_step"])
    except FileNotFoundError:
        return f"it has no {_STATE}"
    except (OSError, ValueError, TypeError, LookupError):
        return f"{_STATE} is empty or cut off"
    if not _has_one(checkpoint, _WEIGHTS):
        return "it has no weights"
    for file in checkpoint.glob("*.safetensors"):
        if not _is_whole_safetensors(file):
            return f"{file.name} is cut off"
    for pattern in ("*.pt", "*.pth", "*.bin"):
        for file in checkpoint.rglob(pattern):
            if not zipfile.is_zipfile(file):  # as torch.save writes; the directory of a zip file is at its end
                return f"{file.relative_to(checkpoint)} is cut off"
    if not weights_only and not _has_one(checkpoint, _OPTIMIZER):
        return "it has no state of the optimizer; --resume_only_model true does without"
    return None


def _has_one(checkpoint: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a folder has anything that one of the patterns names."""
    return any(next(checkpoint.glob(pattern), None) for pattern in patterns)


def _is_whole_safetensors(file: Path) -> bool:
    try:
        start, header = read_header(file)
    except FastMTPError:
        return False
    return file.stat().st_size >= start + max((entry["data_offsets"][1] for entry in header.values()), default=0)


def _checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    steps = {path: match for path in run.glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))}
    return sorted(steps, key=lambda path: int(steps[path][1]), reverse=True)


def _newest_whole(run: Path, weights_only: bool) -> Path | None:
    return next((path for path in _checkpoints(run) if what_is_missing(path, weights_only) is None), None)


def finished_run(args: Any) -> dict[str, Any] | None:
    """What a run wrote down when it ended, if the checkpoint to resume from is its last one and the arguments are the
    same; else None."""
    if not args.resume_from_checkpoint:
        return None
    checkpoint = Path(args.resume_from_checkpoint).resolve()
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        before = json.loads((checkpoint / "args.json").read_text(encoding="utf-8"))
        lines = (checkpoint.parent / "logging.jsonl").read_text(encoding="utf-8").splitlines()
        record = json.loads(lines[-1])
        step, steps = int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, TypeError, LookupError):
        return None
    now = json.loads(json.dumps(check_json_format(vars(args))))
    same = all(now.get(name) == before.get(name) for name in (now.keys() | before.keys()) - _OF_A_PROCESS)
    ended = "last_model_checkpoint" in record and record.get("global_step") == step
    return record if same and ended and step >= steps else None


def say_finished(args: Any) -> None:
    """One line; and the folder that ms-swift made for a new version of the run goes again."""
    if not is_master():
        return
    checkpoint = Path(args.resume_from_checkpoint).resolve()
    print(f"{checkpoint.parent}: this run is finished, {checkpoint.name} is its last; nothing is left to do")
    if Path(args.output_dir).resolve() != checkpoint.parent:
        with suppress(OSError):  # not empty, so not made by this start only
            os.rmdir(args.output_dir)


def is_fastmtp(trainer: Any) -> bool:
    """Whether a trainer of transformers is one of `--model_type fastmtp`."""
    return getattr(getattr(trainer, "model_meta", None), "model_type", None) == "fastmtp"


def take_away_unfinished(run: Path) -> None:
    """Remove what a killed run left of checkpoints that it was writing or removing."""
    if is_local_master() and run.is_dir():
        for folder in run.iterdir():
            if _HIDDEN.fullmatch(folder.name):
                take_away_if_dead(folder)
    _meet()


def whole_checkpoints(save: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `Trainer._save_checkpoint`, so that `checkpoint-N` appears when all of it is there.

    Raises `FastMTPError` if it cannot be written, or if what was trained is not finite.
    """

    def save_whole(self: Any, model: Any, trial: Any) -> Any:
        if not is_fastmtp(self):
            return save(self, model, trial)
        check_trained(self.accelerator.unwrap_model(self.model), self.state.global_step)
        run, name = run_folder(self, trial), f"checkpoint-{self.state.global_step}"
        hidden = run / f".{name}.tmp"
        with _locked(run, hidden):
            _save_hidden(save, self, model, trial, hidden / name)
            if self.args.should_save and (against := getattr(self, "against_initial", None)):
                against.mark(hidden / name)
            # The best one so far may be this one: under the name that it gets.
            best = self.state.best_model_checkpoint
            if best and Path(best) == hidden / name:
                self.state.best_model_checkpoint = str(run / name)
                if self.args.should_save:
                    self.state.save_to_json(str(hidden / name / _STATE))
            # When all ranks have written it takes its place: on the main machine first, others may share its disk.
            _meet()
            if is_master():
                _finish(hidden, run / name)
            _meet()
            if is_local_master():
                _finish(hidden, run / name)
        if self.args.should_save:
            remove_old(self, run)
        if self.args.push_to_hub:
            push_checkpoint(self, run / name)
        return None

    return save_whole


def _save_hidden(save: Callable[..., Any], trainer: Any, model: Any, trial: Any, checkpoint: Path) -> None:
    """transformers' own saving, into a hidden folder. Raises `FastMTPError` if it cannot be written."""
    # What it asks where to write, and which checkpoints there are: only the new one, so it removes none.
    try:
        with saving_into(trainer, checkpoint.parent):
            save(trainer, model, trial)
    except Exception as error:
        place = checkpoint.parent.parent / checkpoint.name
        if isinstance(error, OSError) or "(os error " in str(error):  # safetensors and tokenizers, which keep the text
            raise cannot_write(place, error, checkpoint) from None
        if is_full_disk(error):  # torch, which keeps nothing of the reason
            raise FastMTPError(f"{place}: cannot be written; is the disk full? Free space and start again") from None
        raise


@contextmanager
def _locked(run: Path, hidden: Path) -> Iterator[None]:
    """A hidden folder that lasts as long as the `with`. Raises `FastMTPError` if it cannot be made."""
    if not is_master():
        yield
        return
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        lock = os.open(hidden / LOCK, os.O_RDWR | os.O_CREAT)
        # ms-swift copies it into the checkpoint from the folder above.
        if (run / "args.json").exists():
            (hidden / "args.json").write_bytes((run / "args.json").read_bytes())
    except OSError as error:
        raise cannot_write(hidden, error) from None
    try:
        if not lock_file(lock, without_locks=True):
            raise FastMTPError(f"{run}: another run saves its checkpoints here; name another --output_dir")
        try:
            yield
        finally:
            discard(hidden)
    finally:
        os.close(lock)


def _finish(hidden: Path, checkpoint: Path) -> None:
    """The new checkpoint takes its place, and that of one of the same step. Raises `FastMTPError` if it cannot."""
    made = hidden / checkpoint.name
    if not made.exists():
        return
    try:
        flush(made)
        if checkpoint.exists():
            os.replace(checkpoint, hidden / "replaced")
        os.replace(made, checkpoint)
    except OSError as error:
        raise cannot_write(checkpoint, error, made) from None
    discard(hidden)


def remove_old(trainer: Any, run: Path) -> None:
    """What `--save_total_limit` does not keep, each at once: a kill leaves no half of one."""
    kept = trainer.args.save_total_limit
    if kept is None or kept <= 0:
        return
    # As transformers' `rotate_checkpoints`: the newest and the best stay, of the others the oldest go.
    checkpoints = sort_checkpoints(str(run), use_mtime=True)
    protected = {checkpoints[-1], str(Path(trainer.state.best_model_checkpoint or ""))} if checkpoints else set()
    removable = [Path(path) for path in checkpoints if path not in protected]
    too_many = len(checkpoints) - max(kept, len(protected & set(checkpoints)))
    for checkpoint in removable[: max(too_many, 0)]:
        with suppress(OSError):
            remove_at_once(checkpoint)


def finish_run(init_state: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `Trainer._init_training_state`: where the checkpoint is the last, what comes after one is done
    again. A run that was killed then may not have done it."""

    def init_and_finish(self: Any, max_steps: int, *args: Any, **options: Any) -> Any:
        result = init_state(self, max_steps, *args, **options)
        checkpoint = self.args.resume_from_checkpoint
        if is_fastmtp(self) and checkpoint and self.state.global_step >= max_steps:
            logger.info(f"{checkpoint}: is at step {self.state.global_step} of {max_steps}, no step is left")
            self.state.last_model_checkpoint = checkpoint
            link_last_checkpoint(self)
            if self.args.should_save:
                remove_old(self, Path(checkpoint).resolve().parent)
        return result

    return init_and_finish


def no_step_too_many(run_epoch: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `Trainer._run_epoch`, which takes a step before it asks whether one is left."""

    def run_if_steps_are_left(self: Any, *args: Any, **options: Any) -> Any:
        if is_fastmtp(self) and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return run_epoch(self, *args, **options)

    return run_if_steps_are_left


def links_again(handle: Callable[..., Any]) -> Callable[..., Any]:
    """ms-swift's `SwiftSft._handle_trainer_state`, which stops where a run that was killed made its links already."""

    def unlink_and_handle(self: Any, trainer: Any, is_write_rank: bool) -> Any:
        if self.args.model_type == "fastmtp" and self.args.create_checkpoint_symlink and is_write_rank:
            for link in (Path(self.args.output_dir, "last"), Path(self.args.output_dir, "best")):
                if link.is_symlink():
                    link.unlink()
        return handle(self, trainer, is_write_rank)

    return unlink_and_handle


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()
