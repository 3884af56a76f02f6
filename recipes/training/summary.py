"""What a run says of itself: five lines at its start; at its end where the adapter is, and what comes next."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling_minigpt4.backbones import is_local
from modeling_minigpt4.quantization_minigpt4 import number_of_values
from modeling_minigpt4.remote_code_minigpt4 import brings_any_code
from recipes_minigpt4.training.options import GROUPED
from recipes_minigpt4.utils.embedded_world import TINY, is_shipped
from recipes_minigpt4.utils.redaction import redact
from recipes_minigpt4.utils.text import duration


SAVING = logging.getLogger("modeling_minigpt4.saving_minigpt4")  # which tells of local backbones at every save
MANY_PADS = 0.1  # share of batches
PANEL, LOG = "panel.html", "trainer_state.json"


def describe_start(trainer: Any) -> str:
    """Five lines: the parts, what trains, the data, the steps, and where results go."""
    args, model = trainer.args, trainer.model
    names_of: dict[str, list[str]] = {}  # source → its parts
    for part, source in model.config.backbones.items():
        name = source["name_or_path"]
        names_of.setdefault(TINY if is_shipped(name) else name, []).append(part.replace("_", " "))
    parts = "; ".join(f"{', '.join(those)} {name}" for name, those in names_of.items()) or "saved whole"
    names = trainer.dataset_name or []
    names = [names] if isinstance(names, str) else list(names)
    count = f", {len(trainer.train_dataset):,} samples" if hasattr(trainer.train_dataset, "__len__") else ", streamed"
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    total = batch * accumulation * args.world_size
    length = f"{args.max_steps:,}" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs in steps"
    saved = {"no": "no checkpoints", "epoch": "a checkpoint every epoch"}.get(
        args.save_strategy.value, f"a checkpoint every {args.save_steps:g} steps"
    )
    return _lines(
        model=parts,
        trains=describe_parameters(model),
        data=", ".join(map(str, names)) + count if names else count.lstrip(", "),
        **describe_evaluation(trainer),
        steps=f"{length} of {total} pictures ({args.world_size} × {batch} rows × {accumulation} accumulated)",
        output=f"{args.output_dir}, {saved}",
    )


def describe_evaluation(trainer: Any) -> dict[str, str]:
    """How many samples are evaluated on, when, and what for; nothing where there are none."""
    args, rows = trainer.args, trainer.eval_dataset
    if not hasattr(rows, "__len__") or isinstance(rows, dict):
        return {}
    times = {"steps": f"every {args.eval_steps:g} steps and at the end", "epoch": "every epoch"}
    when = times.get(args.eval_strategy.value, "before the first step")
    best = f", the best by {args.metric_for_best_model} is saved" if args.load_best_model_at_end else ""
    return {"eval": f"{len(rows):,} samples {when}{best}"}


def describe_parameters(model: Any) -> str:
    """What trains and what is frozen, each with its number of parameters."""
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, parameter in model.named_parameters():
        part = name.removeprefix("model.").split(".")[0]
        counts[parameter.requires_grad][part] += number_of_values(parameter)
    trained, frozen = (
        ", ".join(f"{part} {count:,}" for part, count in counts[trains].items()) for trains in (True, False)
    )
    return f"{trained} parameters; frozen: {frozen or 'nothing'}"


def describe_end(trainer: Any, pads: float) -> str:
    """
    Steps and pads; where the adapter is, what loads it, and the next command; where panel and log are.

    Args:
        trainer: after training.
        pads: their share in the batches of the run, 0 to 1.
    """
    folder = Path(trainer.args.output_dir)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*/adapter_model.safetensors")]
    seconds = next((one["train_runtime"] for one in reversed(trainer.state.log_history) if "train_runtime" in one), 0)
    trust, option = ("", "")
    if brings_any_code(trainer.model.config):
        trust, option = ", trust_remote_code=True", " --trust_remote_code true"
    following = (
        f"minigpt4 stage2 --model_name_or_path {folder} --dataset_name DATA --output_dir DIR{option}"
        if trainer.stage == 1
        else f"minigpt4 push {folder} you/your-adapter{option}"
    )
    panel = {"panel": str(folder / PANEL)} if (folder / PANEL).is_file() else {}
    local = {part: one["name_or_path"] for part, one in trainer.model.config.backbones.items() if is_local(one)}
    private = [f"{part} {name}" for part, name in local.items() if not is_shipped(name)]
    where = f"only this machine has {', '.join(private)}; push these backbones before you publish the adapter"
    return _lines(
        done=f"{trainer.state.global_step:,} steps in {duration(seconds)}",
        pads=describe_pads(pads, trainer.args.train_sampling_strategy == GROUPED),
        **describe_evaluated(trainer),
        adapter=f"{folder}, {sum(path.stat().st_size for path in weights):,} bytes",
        load=f'AutoModelForImageTextToText.from_pretrained("{folder}"{trust})  # after `import modeling_minigpt4`',
        next=following,
        **panel,
        log=str(folder / LOG),
        **({"note": where} if private else {}),
    )


def describe_evaluated(trainer: Any) -> dict[str, str]:
    """The last numbers of an evaluation, of the checkpoint that is saved; nothing where there was none."""
    found = trainer.evaluated()
    if not {"eval_loss", "eval_mean_token_accuracy"} <= found.keys():
        return {}
    numbers = f"loss {found['eval_loss']:.4f}, token accuracy {found['eval_mean_token_accuracy']:.3f}"
    best = ", the best" if trainer.args.load_best_model_at_end and trainer.state.best_global_step else ""
    return {"eval": f"{numbers} at step {found['step']:,}{best}"}


def describe_pads(share: float, grouped: bool) -> str:
    """How much of batches were pads, and what to do if that is much."""
    remedy = f"; --train_sampling_strategy {GROUPED} makes them few" if share >= MANY_PADS and not grouped else ""
    return f"{share:.1%} of what batches held{remedy}"


def _lines(**texts: str) -> str:
    """A line for each text, without secrets."""
    return redact("\n".join(f"{name:<8}{text}" for name, text in texts.items()))


@contextmanager
def told_at_the_end() -> Iterator[None]:
    """Keep the notice that backbones are folders of this machine for the last lines of a run, which tell it once."""

    def is_news(record: logging.LogRecord) -> bool:
        return "refers to folders of this machine" not in record.getMessage()

    SAVING.addFilter(is_news)
    try:
        yield
    finally:
        SAVING.removeFilter(is_news)
