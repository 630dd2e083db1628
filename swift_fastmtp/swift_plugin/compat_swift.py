"""What the plugin uses of ms-swift, and of the trainer below it, beyond their documented interface.

ms-swift has registries for models, templates, datasets, losses and tuners, and they are used. Between parsing the
arguments and the last checkpoint it has no hooks, so some of its methods are wrapped (`wrap`). Each stands here with
the reason. Tried with ms-swift 4.6.0, transformers 5.19.0, deepspeed 0.19.8, datasets 4.8.4, modelscope 1.40.2 and
torch 2.13.0. `check` looks at all of them when the plugin registers, before anything is loaded.

This file imports nothing heavy: `autoload` uses it in every process that imports ms-swift.
"""

import ast
import functools
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import FastMTPError
from ..files.libraries import Name, changed, check_names, find, owner_of

PLUGIN_FILE = Path(__file__).parent / "plugin" / "fastmtp_plugin.py"
"""What `--external_plugins` takes."""

# --- Methods that are wrapped.

IMPORT_PLUGINS = Name(
    "ms-swift",
    "swift.arguments.base_args.base_args:BaseArguments._import_external_plugins",
    "the plugin is loaded there, once the arguments name it",
    first=("self",),
)
PARSE_MODEL_KWARGS = Name(
    "ms-swift",
    "swift.arguments:BaseArguments._init_model_kwargs",
    "defaults and checks belong after plugins and before anything is loaded",
    first=("self",),
)
LOAD_MODEL = Name(
    "ms-swift",
    "swift.arguments:BaseArguments.get_model_processor",
    "a model is loaded with the knobs of its run",
    first=("self",),
)
LOOK_AT_FOLDER = Name(
    "ms-swift",
    "swift.model.model_meta:_get_model_info",
    "it runs the Python code of any model folder",
    first=("model_dir", "model_type"),
)
TRAIN = Name("ms-swift", "swift.pipelines.train.sft:SwiftSft.run", "a run begins and ends there", first=("self",))
AFTER_ENCODING = Name(
    "ms-swift",
    "swift.pipelines.train.sft:SwiftSft._post_process_datasets",
    "rows that are too long are gone there, silently",
    first=("self", "datasets"),
)
CHOOSE_TEMPLATE = Name(
    "ms-swift",
    "swift.pipelines.train.sft:SwiftSft._prepare_template",
    "rows are rendered by the chat template of the model's folder",
    first=("self",),
)
READ_ROWS = Name(
    "ms-swift",
    "swift.pipelines.train.sft:SwiftSft._get_dataset",
    "rows are rendered before ms-swift encodes them",
    first=("self",),
)
TRAINER = Name(
    "ms-swift",
    "swift.pipelines.train.sft:SwiftSft.train",
    "the trainer is made, and no step is taken",
    first=("self", "trainer"),
)
LINK_CHECKPOINTS = Name(
    "ms-swift",
    "swift.pipelines.train.sft:SwiftSft._handle_trainer_state",
    "it stops at links that a killed run has made already",
    first=("self", "trainer", "is_write_rank"),
)
EXPORT = Name(
    "ms-swift", "swift.pipelines.export.export:SwiftExport.run", "export is a full checkpoint", first=("self",)
)
MERGE_LORA = Name(
    "ms-swift",
    "swift.pipelines.export.export:merge_lora",
    "a merged model keeps its MTP layer",
    first=("args",),
)
SAVE_CHECKPOINT = Name(
    "transformers",
    "transformers.trainer:Trainer._save_checkpoint",
    "a checkpoint appears when all of it is there",
    first=("self", "model", "trial"),
)
INIT_STATE = Name(
    "transformers",
    "transformers.trainer:Trainer._init_training_state",
    "a finished run that is started again ends as it did",
    first=("self", "max_steps"),
)
RUN_EPOCH = Name(
    "transformers",
    "transformers.trainer:Trainer._run_epoch",
    "it takes a step before it asks whether one is left",
    first=("self",),
)
WRAPPED = (
    IMPORT_PLUGINS,
    PARSE_MODEL_KWARGS,
    LOAD_MODEL,
    LOOK_AT_FOLDER,
    TRAIN,
    AFTER_ENCODING,
    CHOOSE_TEMPLATE,
    READ_ROWS,
    TRAINER,
    LINK_CHECKPOINTS,
    EXPORT,
    MERGE_LORA,
    SAVE_CHECKPOINT,
    INIT_STATE,
    RUN_EPOCH,
)

# --- Methods that subclasses of ours override. If one were renamed, ms-swift would call its own.

OVERRIDDEN = (
    Name(
        "ms-swift",
        "swift.template:Template._encode",
        "a row becomes token ids (template.py)",
        first=("self", "inputs"),
    ),
    Name(
        "ms-swift",
        "swift.template:Template._preprocess_inputs",
        "it would change rows that are rendered already (template.py)",
        first=("self", "inputs"),
    ),
    Name(
        "ms-swift",
        "swift.model:ModelMeta.check_requires",
        "the last call before the template is chosen, and the first that knows the folder (model.py)",
        first=("self", "model_info"),
    ),
    Name("ms-swift", "swift.model:ModelLoader.get_config", "it would run code (model.py)", first=("self", "model_dir")),
    Name(
        "ms-swift",
        "swift.model:ModelLoader.get_processor",
        "rows are text, also for vision models (model.py)",
        first=("self", "model_dir", "config"),
    ),
    Name(
        "ms-swift",
        "swift.model:ModelLoader.get_model",
        "the class with the MTP layer (model.py)",
        first=("self", "model_dir", "config", "processor", "model_kwargs"),
    ),
    Name("ms-swift", "swift.model:ModelLoader.default_trust_remote_code", "no code of a folder runs (model.py)"),
    Name(
        "ms-swift",
        "swift.dataset.loader:DatasetLoader.load",
        "rows of our own form (dataset.py)",
        first=("self", "dataset_syntax", "dataset_meta"),
    ),
)

# --- Names that are called or replaced.

SAVE_MODEL = Name(
    "transformers",
    "transformers.trainer:Trainer.save_model",
    "a saved model keeps its MTP layer",
    first=("self", "output_dir", "_internal_call"),
)
CALLED = (
    Name("ms-swift", "swift.model.model_meta:AutoConfig", "replaced by one that runs no code, for a moment"),
    Name("ms-swift", "swift.model.model_meta:logger", "it warns of code that is not run"),
    Name("ms-swift", "swift.model.model_meta:get_matched_model_meta", "ms-swift's templates of base models"),
    Name("ms-swift", "swift.model.model_meta:get_matched_model_types", "the same, by architecture"),
    Name("ms-swift", "swift.dataset.dataset_syntax:DatasetSyntax.parse", "what --dataset names"),
    Name("ms-swift", "swift.utils.utils:check_json_format", "arguments as args.json has them"),
    Name("ms-swift", "swift.utils.utils:get_external_files", "data workers replay these plugins"),
    Name(
        "ms-swift",
        "swift.trainers.mixin:SwiftMixin.compute_custom_metrics",
        "it logs acceptance in training and evaluation",
        first=("metrics", "key_prefix"),
    ),
    Name(
        "ms-swift",
        "swift.trainers.mixin:SwiftMixin._update_last_checkpoint_symlink",
        "a run that was killed may not have made the link",
        first=("self",),
    ),
    Name(
        "ms-swift",
        "swift.trainers:Seq2SeqTrainer.compute_loss",
        "it takes the labels out of what the model gets",
        first=("self", "model", "inputs"),
        among=("num_items_in_batch",),
    ),
    Name(
        "ms-swift",
        "swift.pipelines.train.sft:SwiftSft._encode_dataset",
        "a second validation set is encoded as the first",
        first=("self", "train_dataset", "val_dataset"),
    ),
    Name("modelscope", "modelscope.hub.utils.utils:get_cache_dir", "where ms-swift caches datasets"),
    SAVE_MODEL,
    Name(
        "transformers",
        "transformers.trainer:Trainer._get_grad_norm",
        "the gradient's norm before the optimizer has it",
        first=("self", "model"),
    ),
    Name(
        "transformers", "transformers.trainer:Trainer._get_output_dir", "where checkpoints go", first=("self", "trial")
    ),
    Name(
        "transformers",
        "transformers.trainer:Trainer._push_from_checkpoint",
        "it uploads what it finds",
        first=("self", "checkpoint_folder"),
    ),
    Name(
        "transformers",
        "transformers.trainer_utils:sort_checkpoints",
        "which checkpoints --save_total_limit keeps",
        first=("output_dir",),
        among=("use_mtime",),
    ),
    Name("transformers", "transformers.trainer:PreTrainedConfig", "it reads a checkpoint's config.json"),
    Name(
        "transformers",
        "transformers:HfArgumentParser.parse_args_into_dataclasses",
        "which arguments the user named",
        first=("self", "args"),
    ),
)


@functools.cache
def check() -> None:
    """Raises `FastMTPError` for the first name that is gone or means something else."""
    check_names(WRAPPED)
    check_names(OVERRIDDEN)
    check_names(CALLED)
    check_export_actions()
    check_error_texts()


def wrap(name: Name, wrapper: Callable[[Any], Any]) -> None:
    """What `name` stands for becomes `wrapper` of it, once. Raises `FastMTPError` if it is gone."""
    original = find(name)
    if getattr(original, "of_fastmtp", False):
        return
    wrapped: Any = functools.wraps(original)(wrapper(original))
    wrapped.of_fastmtp = True
    owner, last = owner_of(name)
    setattr(owner, last, wrapped)


# --- The plugin file among `external_plugins`.
#
# ms-swift imports the files of that list, and its data workers import them again. It knows no installed plugins.


def load_among_plugins(arguments_class: Any, is_asked_for: Callable[[Any], bool]) -> None:
    """Arguments that ask for the plugin load it as if `--external_plugins` had named it.

    Called by `autoload` while ms-swift is being imported. Where ms-swift has no such method, a run that asks for the
    plugin stops; others, which have nothing to do with it, go on.
    """

    def import_with_ours(self: Any, import_plugins: Callable[[], None]) -> None:
        if not is_asked_for(self):
            import_plugins()
            return
        named = self.external_plugins
        named = [named] if isinstance(named, str) else list(named or [])
        if any(os.path.realpath(os.path.expanduser(file)) == os.path.realpath(PLUGIN_FILE) for file in named):
            import_plugins()
            return
        self.external_plugins = [*named, str(PLUGIN_FILE)]
        import_plugins()
        # Not for args.json: another machine, or another environment, has the file elsewhere.
        self.external_plugins = [file for file in self.external_plugins if file != str(PLUGIN_FILE)]

    _around_import(arguments_class, is_asked_for, import_with_ours)


def before_plugins(arguments_class: Any, is_asked_for: Callable[[Any], bool], register: Callable[[], None]) -> None:
    """Arguments that ask for something that is no plugin have it registered where plugins are loaded."""

    def register_first(self: Any, import_plugins: Callable[[], None]) -> None:
        if is_asked_for(self):
            register()
        import_plugins()

    _around_import(arguments_class, is_asked_for, register_first)


def _around_import(
    arguments_class: Any, is_asked_for: Callable[[Any], bool], around: Callable[[Any, Callable[[], None]], None]
) -> None:
    """`around(arguments, original)` in place of the method that imports plugins; without one, a refusal."""
    name = IMPORT_PLUGINS.path.rpartition(".")[2]
    original = getattr(arguments_class, name, None)
    if original is None:
        _refuse_when_asked_for(arguments_class, is_asked_for)
        return

    @functools.wraps(original)
    def import_plugins(self: Any) -> None:
        around(self, functools.partial(original, self))

    setattr(arguments_class, name, import_plugins)


def _refuse_when_asked_for(arguments_class: Any, is_asked_for: Callable[[Any], bool]) -> None:
    original = arguments_class.__post_init__

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        if is_asked_for(self):
            raise changed("ms-swift", f"{IMPORT_PLUGINS.short} is gone ({IMPORT_PLUGINS.why})")
        original(self)

    arguments_class.__post_init__ = post_init


# --- What `swift export` can be asked for.

EXPORT_ACTIONS = (
    "to_peft_format",
    "quant_method",
    "to_ollama",
    "to_cached_dataset",
    "to_hf",
    "to_mcore",
    "push_to_hub",
)
"""Arguments by which `swift export` does something of its own."""
_NO_ACTIONS = {"merge_lora", "mcore_adapter"}
"""Arguments that it looks at too: our export merges LoRA by itself."""


def check_export_actions() -> None:
    """Raises `FastMTPError` if `SwiftExport.run` decides by other arguments than it did: a new action would be taken
    for a plain export."""
    run = inspect.unwrap(find(EXPORT))
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(run)))
    except OSError:  # installed without sources
        return
    asked = set()
    for node in ast.walk(source):
        if isinstance(node, ast.If):
            asked |= {part.attr for part in ast.walk(node.test) if isinstance(part, ast.Attribute)}
    if asked != {*EXPORT_ACTIONS, *_NO_ACTIONS}:
        different = ", ".join(sorted(asked ^ {*EXPORT_ACTIONS, *_NO_ACTIONS}))
        raise changed("ms-swift", f"SwiftExport.run decides by other arguments ({different})")


# --- Error texts. Of these errors torch keeps nothing but a text.

_NO_MEMORY = "can't allocate memory"
_CANNOT_WRITE = re.compile("PytorchStreamWriter failed|unexpected pos|iostream error")  # the last of small files


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU torch has an exception of its own; of a CPU's memory, a text."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY in str(error)


def is_full_disk(error: BaseException) -> bool:
    """Whether torch.save could not write."""
    return _CANNOT_WRITE.search(str(error)) is not None


def check_error_texts() -> None:
    """Raises `FastMTPError` if torch writes other texts: made to fail, by more memory than there can be, and by a file
    that takes nothing."""
    import torch

    try:
        torch.empty(1 << 62, dtype=torch.uint8)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise changed("torch", f"a failed allocation says {str(error)[:80]!r}, not {_NO_MEMORY!r}") from None
    full = Path("/dev/full")
    if not full.exists():
        return
    for size in (1, 100_000):
        try:
            torch.save(torch.zeros(size), full)
        except RuntimeError as error:
            if not is_full_disk(error):
                raise changed("torch", f"torch.save to a full disk says {str(error)[:80]!r}") from None


# --- The trainer: checkpoints, gradients, loss, metrics.


@contextmanager
def saving_into(trainer: Any, folder: Path) -> Iterator[None]:
    """Inside, `Trainer._save_checkpoint` writes below `folder`, sees no other checkpoints, and uploads nothing."""

    def output_dir(trial: Any = None) -> str:
        return str(folder)

    def push(checkpoint_folder: str) -> None:
        """Nothing: the checkpoint is not whole yet."""

    trainer._get_output_dir, trainer._push_from_checkpoint = output_dir, push
    try:
        yield
    finally:
        del trainer._get_output_dir, trainer._push_from_checkpoint


def run_folder(trainer: Any, trial: Any) -> Path:
    """Where a trainer's checkpoints are."""
    return Path(trainer._get_output_dir(trial=trial))


def push_checkpoint(trainer: Any, checkpoint: Path) -> None:
    """Upload a checkpoint, as the trainer would have."""
    trainer._push_from_checkpoint(str(checkpoint))


def link_last_checkpoint(trainer: Any) -> None:
    """ms-swift's link to the newest checkpoint."""
    trainer._update_last_checkpoint_symlink()


def reset_metrics(trainer: Any, mode: str) -> None:
    """Drop what one trainer counted in `train` or `eval` and did not log."""
    for metric in trainer.custom_metrics[mode].values():
        metric.reset()


def encode_rows(sft: Any, rows: Any) -> Any:
    """Rows and None, as ms-swift encodes training and validation data."""
    return sft._encode_dataset(rows, None)


def after_saving(trainer: Any, complete: Callable[[Path], None]) -> None:
    """`complete(folder)` in the process that saves, each time one trainer has saved its model: before older checkpoints
    are removed and anything is uploaded, where a callback's `on_save` comes after both.

    Raises `FastMTPError` if trainers save otherwise than they did.
    """
    find(SAVE_MODEL)
    save = trainer.save_model

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        save(output_dir, _internal_call)
        if trainer.args.should_save:
            complete(Path(output_dir or trainer.args.output_dir))

    trainer.save_model = save_model


def around_loss(trainer: Any, compute_loss: Callable[..., Any]) -> None:
    """`compute_loss(trainer, original, model, inputs, ...)` in place of one trainer's own.

    ms-swift makes the loss from a name, so it cannot be asked for a trainer class.
    """
    trainer.compute_loss = functools.partial(compute_loss, trainer, trainer.compute_loss)


def around_grad_norm(trainer: Any, grad_norm: Callable[..., Any]) -> None:
    """`grad_norm(trainer, original, ...)` in place of one trainer's own. Callbacks do not get the norm before the
    optimizer has taken its step."""
    trainer._get_grad_norm = functools.partial(grad_norm, trainer, trainer._get_grad_norm)


def add_metric(trainer: Any, mode: str, name: str, metric: Any) -> None:
    """Have ms-swift's trainer log a metric in `train` or `eval`.

    A callback's `on_log` comes after the trainer has written its history, and too late for `--metric_for_best_model`.
    Raises `FastMTPError` if the trainer keeps its metrics otherwise.
    """
    metrics = getattr(trainer, "custom_metrics", None)
    if not isinstance(metrics, dict) or mode not in metrics:
        raise changed("ms-swift", f"trainers have no custom_metrics[{mode!r}] (acceptance would not be logged)")
    metrics[mode][name] = metric


def metric_of(trainer: Any, mode: str, name: str) -> Any:
    """What `add_metric` was given."""
    return trainer.custom_metrics[mode][name]


def read_any_config() -> None:
    """transformers' trainer reads a checkpoint's config.json with its bare class, to learn who wrote it. In 5.19 that
    class stops at YaRN under the keys of DeepSeek-V3's, `rope_scaling` and `rope_theta`: it lacks one attribute."""
    from transformers import PreTrainedConfig, trainer

    class AnyConfig(PreTrainedConfig):
        max_position_embeddings: int | None = None

    trainer.PreTrainedConfig = AnyConfig


def fingerprint_of(dataset: Any) -> str:
    """The name that datasets gives to a dataset's content; its cache is named by it."""
    fingerprint = getattr(dataset, "_fingerprint", None)
    if not isinstance(fingerprint, str):
        raise changed("datasets", "a Dataset has no _fingerprint (rows of other data would be taken from the cache)")
    return fingerprint


# --- DeepSpeed's checkpoints: two of its options, which transformers sets for PEFT models only.

_SAVE = Name(
    "deepspeed",
    "deepspeed:DeepSpeedEngine.save_checkpoint",
    "checkpoints hold the head only",
    first=("self", "save_dir"),
    among=("exclude_frozen_parameters",),
)
_LOAD = Name(
    "deepspeed",
    "deepspeed:DeepSpeedEngine.load_checkpoint",
    "checkpoints hold the head only",
    first=("self", "load_dir"),
    among=("load_module_strict",),
)


def head_only_deepspeed_checkpoints() -> None:
    """DeepSpeed writes the frozen backbone into every checkpoint unless told otherwise."""

    def save(original: Any) -> Any:
        def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self, *args, **{**kwargs, "exclude_frozen_parameters": True})

        return save_checkpoint

    def load(original: Any) -> Any:
        def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self, *args, **{**kwargs, "load_module_strict": False})

        return load_checkpoint

    wrap(_SAVE, save)
    wrap(_LOAD, load)


# --- One line for an error of the user's: `sys.excepthook`.


def print_errors_as_lines() -> None:
    """A `FastMTPError` that nobody catches is printed as its line, not as a traceback. The exit status stays 1.

    The plugin is loaded while ms-swift parses the arguments. The script and the pipeline that it makes run already, so
    no frame of ours is above them, where the error could be caught: what Python calls last is the only place. All
    other errors go on to the hook that was there. From Python, errors are raised as ever.
    """
    original = sys.excepthook
    if getattr(original, "of_fastmtp", False):
        return

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, FastMTPError):
            print(f"fastmtp: error: {error}", file=sys.stderr)
        else:
            original(kind, error, trace)

    excepthook.of_fastmtp = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook
