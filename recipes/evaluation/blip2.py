"""Train BLIP-2 the ordinary way, with transformers' Trainer, on the rows that MiniGPT-4's stages are trained on.

The paper compares MiniGPT-4 with BLIP-2 as it is, and tells of BLIP-2 fine-tuned on the stage-2 data in words only.
This makes that model, for `minigpt4 evaluate`:

    python -m recipes_minigpt4.evaluation.blip2 --config blip2_stage2 --dataset_name cc_sbu_align

The embedded world, BLIP-2 in miniature on the demo's own frozen parts: as it is, and fine-tuned.

    python -m recipes_minigpt4.evaluation.blip2 --config tiny_blip2_stage1
    python -m recipes_minigpt4.evaluation.blip2 --config tiny_blip2_stage2
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    Trainer,
    TrainingArguments,
)
from trl import TrlParser

from processing_minigpt4.image_opening_minigpt4 import open_image
from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.formatting import INSTRUCTIONS
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE
from recipes_minigpt4.utils.command_line import one_spelling
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.runs import quiet


QUESTION = "Question: {} Answer:"  # the words of BLIP-2's paper around an instruction


@dataclass
class Blip2Arguments:
    """Which BLIP-2 is trained, and on which of the stages' rows."""

    model_name_or_path: str = field(
        default="Salesforce/blip2-opt-2.7b",
        metadata={"help": "A BLIP-2 with a decoder; `tiny` for the embedded world's frozen parts in BLIP-2's layout."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the repository."})
    dtype: str = field(default="float32", metadata={"help": "Of frozen weights; what trains is in float32."})
    stage: int = field(
        default=2,
        metadata={"help": "1: a caption follows the picture; 2: a description follows an instruction in `prompt`."},
    )
    prompt: str = field(default=QUESTION, metadata={"help": "Words around an instruction, `{}`, in stage 2."})
    train_parts: list[str] = field(
        default_factory=lambda: ["language_projection"],
        metadata={"help": "Parts that train: language_projection, as MiniGPT-4 has it, qformer, vision_model, …"},
    )


@dataclass
class Blip2TrainingArguments(TrainingArguments):
    """transformers' settings with the numbers of MiniGPT-4's second stage; bfloat16 on GPUs that know it."""

    learning_rate: float = field(default=3e-5, metadata={"help": "That of the released stage 2."})
    weight_decay: float = field(default=0.05, metadata={"help": "That of the released stages."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "That of the released stages."})
    report_to: str = field(default="none", metadata={"help": "Where losses go."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows become tensors in the collator."})
    bf16: bool = field(
        default_factory=lambda: torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        metadata={"help": "Compute in bfloat16. Default: on GPUs that know it."},
    )


def main(arguments: Sequence[str]) -> Trainer:
    """
    Train, and save model and processor in `output_dir`.

    Raises:
        RecipeError: for settings, data or models that are not as they have to be.
    """
    args, data, training = parse(arguments)
    pairs = load_pairs(data, args.stage, training.seed)
    if not isinstance(pairs, Dataset):
        raise RecipeError("BLIP-2 is trained on data of a known length; leave --streaming and tar files out.")
    if "image" not in pairs.column_names:
        raise RecipeError("BLIP-2 takes one picture and one instruction a row; chats are no data for it.")
    model, processor = load(args)
    freeze(model, args.train_parts)
    collator = Collator(processor, args.stage, args.prompt, data.max_txt_len or (160 if args.stage == 2 else 32))
    trainer = Trainer(model=model, args=training, train_dataset=pairs, data_collator=collator)
    trainer.train()
    model.config.prompt_template = args.prompt if args.stage == 2 else ""
    trainer.save_model(training.output_dir)
    processor.save_pretrained(training.output_dir)
    return trainer


def parse(arguments: Sequence[str]) -> tuple[Blip2Arguments, DataArguments, Blip2TrainingArguments]:
    """Read a YAML file and the command line, which wins."""
    given = one_spelling(arguments)
    if "--config" in given[:-1]:
        place = given.index("--config") + 1
        given[place] = str(shipped_configs().get(given[place], given[place]))
    try:
        args, data, training = TrlParser(
            (Blip2Arguments, DataArguments, Blip2TrainingArguments), prog="python -m recipes_minigpt4.evaluation.blip2"
        ).parse_args_and_config(given, fail_with_unknown_args=True)
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"{one_line(error)}.") from error
    if args.stage not in (1, 2):
        raise RecipeError(f"--stage is {args.stage}; it has to be 1 or 2.")
    return args, data, training


def load(args: Blip2Arguments) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """
    BLIP-2 and its processor.

    Raises:
        RecipeError: if it cannot be loaded, or its language model is no decoder.
    """
    if args.model_name_or_path == TINY:
        return tiny_blip2()
    name, revision = args.model_name_or_path, args.model_revision
    try:
        model = Blip2ForConditionalGeneration.from_pretrained(name, revision=revision, dtype=args.dtype)
        processor = Blip2Processor.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--model_name_or_path {name} cannot be loaded as BLIP-2 ({one_line(error)}).") from error
    if not model.config.use_decoder_only_language_model:
        raise RecipeError(f"The language model of {name} is an encoder and a decoder; name a BLIP-2 with OPT.")
    return model, processor


def tiny_blip2() -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """BLIP-2 of the embedded world's frozen parts, with a new projection; its vocabulary has a place for pictures."""
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_pretrained(LANGUAGE_BACKBONE)
    config = Blip2Config.from_pretrained(VISION_BACKBONE, text_config=language_model.config.to_dict())
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_BACKBONE, padding_side="left")
    size = config.vision_config.image_size
    processor = Blip2Processor(
        BlipImageProcessor(size={"height": size, "width": size}), tokenizer, num_query_tokens=config.num_query_tokens
    )
    with quiet():  # which parts are new is no news here
        model = Blip2ForConditionalGeneration.from_pretrained(VISION_BACKBONE, config=config)
    model.language_model, model.config.text_config = language_model, language_model.config
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    model.generation_config = language_model.generation_config
    return model, processor


def freeze(model: torch.nn.Module, train_parts: Sequence[str]) -> None:
    """
    Let these parts train and no other; they compute in float32.

    Raises:
        RecipeError: if there is no such part.
    """
    model.requires_grad_(False)
    for name in train_parts:
        part = getattr(model, name, None)
        if not isinstance(part, (torch.nn.Module, torch.nn.Parameter)):
            parts = ", ".join(["query_tokens", *(name for name, _ in model.named_children())])
            raise RecipeError(f"--train_parts names {name!r}, which BLIP-2 does not have; it has {parts}.")
        part.requires_grad_(True)
        if isinstance(part, torch.nn.Module):
            part.float()
        else:
            part.data = part.data.float()


class Collator:
    """
    Rows as BLIP-2 takes them: picture, prompt, answer, the end of the text; what is not the answer carries no loss.

    Args:
        processor: BLIP-2's.
        stage: 1, where there is no prompt, or 2.
        prompt: words around an instruction.
        max_txt_len: the most tokens of an answer.
    """

    def __init__(self, processor: Blip2Processor, stage: int, prompt: str, max_txt_len: int) -> None:
        self.processor, self.stage, self.prompt, self.max_txt_len = processor, stage, prompt, max_txt_len

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        pixels = self.processor.image_processor(
            [open_image(row["image"], "white") for row in rows], return_tensors="pt"
        )
        place = tokenizer.convert_tokens_to_ids("<image>")
        ids, labels = [], []
        for row in rows:
            prompt = [place] * self.processor.num_query_tokens + tokenizer(self._asked(row))["input_ids"]
            answer = tokenizer(f" {row['text'].strip()}", add_special_tokens=False)["input_ids"][
                : self.max_txt_len - 1
            ]
            answer = [*answer, tokenizer.eos_token_id]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return {**pixels, "input_ids": padded, "attention_mask": mask, "labels": wanted}

    def _asked(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row; of four instructions the one that its answer chooses, the same in every epoch."""
        if self.stage == 1:
            return ""
        instruction = row.get("question") or INSTRUCTIONS[sum(row["text"].encode()) % len(INSTRUCTIONS)]
        return self.prompt.format(instruction)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RecipeError as error:
        raise SystemExit(f"{error}") from None
