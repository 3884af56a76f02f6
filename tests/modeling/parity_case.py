"""
What the original computed, the package's own way to the same tensors, and the stages at which the two are compared.

`fixtures/parity` holds tiny random weights under the original's names, every tensor that the released MiniGPT-4
computed from them (fp32, CPU), and the texts and token ids it was given. `build_case` loads the weights into the
package; `STAGES` are the comparisons, in the order in which data flows.
"""

import copy
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from modeling_minigpt4 import (
    MiniGPT4Config,
    MiniGPT4ForConditionalGeneration,
    MiniGPT4ImageProcessor,
    MiniGPT4Processor,
    convert_minigpt4_to_hf,
)
from processing_minigpt4 import load_chat_template
from recipes_minigpt4.data import formatting as recipes
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.collator import COUNTS
from recipes_minigpt4.training.arguments import StageArguments
from recipes_minigpt4.training.trainer import MiniGPT4Trainer


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "parity"
VARIANTS = ("qformer", "no_qformer")
ROWS = ("stage1", "stage2", "ragged", "truncated")  # batches the original was trained on
CHATS = ("free", "stopped")  # of two turns; one ends at EOS or after 12 tokens, one at "###" too
PLACE = "<ImageHere>"  # of a picture, in the original's texts

# Absolute; the gradients' norms relative. Ids, masks, labels and texts have to be the same.
BOUND, GRADIENT_BOUND = 1e-5, 1e-4


# ---- the package's side ---------------------------------------------------------------------------------------------


def build_tokenizer(marks: dict[str, list[int]], vocab_size: int) -> PreTrainedTokenizerFast:
    """The fixture's tokenizer, a real one: a number is its own id, and marks are one or two ids as `marks` says."""
    words = {str(number): number for number in range(vocab_size)}
    pieces = {"<s>": ["<s>"], "</s>": ["</s>"], "\n": ["\n"], "###": ["##", "#"], "<Img>": ["<Img>"]}
    pieces |= {"</Img>": ["</", "Img>"], "$$": ["$$"]}
    for mark, ids in {**marks, "$$": [0]}.items():
        for piece, token in zip(pieces[mark], ids, strict=True):
            words = {word: number for word, number in words.items() if number != token} | {piece: token}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="$$"))
    # Only what matches is a word: spaces are none.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<Img>|</|Img>|##|#|\n|\d+"), "removed", invert=True)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "$$", "unk_token": "$$"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def translate(template: str) -> str:
    """A chat template of the package, with the fixture's words for "Human: " and "Assistant: "."""
    return load_chat_template(template).replace("Human: ", "20 21 ").replace("Assistant: ", "22 23 ")


def build_processor(facts: dict[str, Any], config: MiniGPT4Config) -> MiniGPT4Processor:
    height, width = config.image_size
    return MiniGPT4Processor(
        image_processor=MiniGPT4ImageProcessor(size={"height": height, "width": width}),
        tokenizer=build_tokenizer(facts["tokenizer_marks"], facts["llm"]["vocab_size"]),
        image_token_id=config.image_token_id,
        num_image_tokens=config.num_image_tokens,
        chat_template=translate("vicuna_v0"),
    )


def read_config(facts: dict[str, Any], attention: str) -> MiniGPT4Config:
    """The fixture's sizes and epsilons; the epsilon of `ln_vision` is left to the package's default."""
    vision, qformer, text = facts["vision"], facts["qformer"], facts["llm"]
    return MiniGPT4Config(
        vision_config={
            "hidden_size": vision["embed_dim"], "intermediate_size": vision["mlp_hidden_dim"],
            "num_hidden_layers": vision["depth"], "num_attention_heads": vision["num_heads"],
            "image_size": vision["img_size"], "patch_size": vision["patch_size"],
            "layer_norm_eps": vision["block_norm_eps"],
        },
        qformer_config=qformer and {
            "vocab_size": qformer["vocab_size"], "hidden_size": qformer["hidden_size"],
            "num_hidden_layers": qformer["num_hidden_layers"], "num_attention_heads": qformer["num_attention_heads"],
            "intermediate_size": qformer["intermediate_size"], "layer_norm_eps": qformer["layer_norm_eps"],
            "cross_attention_frequency": qformer["cross_attention_freq"],
        },
        text_config={name: text[name] for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id", "pad_token_id",
        )},
        num_query_tokens=qformer["query_length"] if qformer else 1,
        attn_implementation=attention,
    )  # fmt: skip


@dataclass
class Case:
    """
    One fixture in the package.

    Args:
        facts: its config.json: sizes, texts, token ids.
        reference: what the original computed, by name.
        model: with the original's weights, frozen as in training.
        processor: around the fixture's tokenizer.
        done: what has been computed for one stage and is compared at others too.
    """

    facts: dict[str, Any]
    reference: dict[str, torch.Tensor]
    model: MiniGPT4ForConditionalGeneration
    processor: MiniGPT4Processor
    done: dict[Any, Any] = field(default_factory=dict)

    def once(self, compute: Callable[..., Any], *key: Any) -> Any:
        if (compute, key) not in self.done:
            self.done[compute, key] = compute(self, *key)
        return self.done[compute, key]


def build_case(variant: str, attention: str = "eager") -> Case:
    facts = json.loads((FIXTURES / variant / "config.json").read_text(encoding="utf-8"))
    config = read_config(facts, attention)
    model = MiniGPT4ForConditionalGeneration(config)
    original = load_file(FIXTURES / variant / "checkpoint_original.safetensors")
    model.load_state_dict(convert_minigpt4_to_hf.convert_original_state_dict(original))
    assert model.language_model.config._attn_implementation == attention
    model.freeze_backbones()
    reference = load_file(FIXTURES / variant / "reference.safetensors")
    return Case(facts, reference, model, build_processor(facts, config))


def picture(case: Case, number: int) -> Pictures.Image:
    """A picture of the right size. The fixture gives pixels as tensors, which take its place behind the processor."""
    height, width = case.model.config.image_size
    return Pictures.new("RGB", (width, height), (40 * number, 90, 10))


def with_pixels(case: Case, inputs: Any, numbers: list[int]) -> dict[str, torch.Tensor]:
    """Inputs of the model with the fixture's pixels for what the image processor made of stand-ins."""
    pixels = case.reference["pixel_values"][numbers]
    assert inputs["pixel_values"].shape == pixels.shape
    return {**inputs, "pixel_values": pixels}


@contextmanager
def tokenized_apart(case: Case) -> Iterator[list[list[int]]]:
    """Ids of every text that the processor gives to the tokenizer on its own, collected while this is open."""
    kind, pieces = type(case.processor.tokenizer), []
    call = kind.__call__

    def listen(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        encoded = call(self, text, *args, **kwargs)
        pieces.extend(encoded["input_ids"] if isinstance(text, list) else [encoded["input_ids"]])
        return encoded

    with patch.object(kind, "__call__", listen):
        yield pieces


# ---- training -------------------------------------------------------------------------------------------------------


def training_rows(case: Case, name: str) -> Dataset:
    """Rows as the recipes make them from pairs of a picture and a caption, with their defaults wherever they fit."""
    facts = case.facts["forward_cases"][name]
    pairs = {"image": [picture(case, number) for number in (0, 1)], "text": facts["answers_text"]}
    pairs = Dataset.from_dict(pairs, features=Features({"image": Image(), "text": Value("string")}))
    if name == "stage1":
        return recipes.stage1_rows(pairs, case.processor, DataArguments())
    if name == "ragged":
        return ragged_rows(case, pairs, facts)
    limit = None if name == "stage2" else facts["max_txt_len"]
    args = DataArguments(instruction_template=translate("vicuna_v0_alignment"), max_txt_len=limit)
    (instruction,) = (re.search(r"</Img> (.*) ###", prompt)[1] for prompt in facts["prompt_list"])
    with patch.object(recipes, "INSTRUCTIONS", (instruction,)):
        return recipes.stage2_rows(pairs, case.processor, args)


def ragged_rows(case: Case, pairs: Dataset, facts: dict[str, Any]) -> Dataset:
    """
    Rows with prompts of different lengths.

    In the original they come from the data (`instruction_input`), one of them without roles. The recipes have one
    chat template per run, so the prompts go straight into their `Rows`.
    """
    tokenizer = case.processor.tokenizer
    rows = recipes.Rows(
        tokenizer=tokenizer,
        image_token=case.processor.image_token,
        prompts=tuple(spelt(case, text) for text in facts["instruction_input"]),
        start="",
        end=facts["end_sym"],
        max_txt_len=facts["max_txt_len"],
        clean=False,
    )
    return pairs.cast_column("image", Image(decode=False)).add_column("prompt", [0, 1]).with_transform(rows)


def spelt(case: Case, text: str) -> str:
    """A text of the original in the package's spelling, in which BOS is part of it."""
    return case.processor.tokenizer.bos_token + text.replace(PLACE, case.processor.image_token)


def collate(case: Case, name: str) -> tuple[dict[str, torch.Tensor], list[list[int]], MiniGPT4Trainer]:
    """The batch that TRL's collator makes for the trainer of the recipes, and the ids of each text in it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = MiniGPT4Trainer(
            model=copy.deepcopy(case.model),  # TRL puts a forward of its own into it
            args=StageArguments(output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True),
            train_dataset=training_rows(case, name),
            processing_class=case.processor,
        )
    examples = [dict(row) for row in trainer.train_dataset]
    with tokenized_apart(case) as pieces:
        batch = trainer.data_collator(examples)
    assert batch.pop(COUNTS)["drawn"] == 2  # which the trainer takes out before the model sees it
    return with_pixels(case, batch, [0, 1]), pieces, trainer


def reference_of(case: Case, name: str) -> dict[str, torch.Tensor]:
    prefix = f"forward.{name}."
    found = {key.removeprefix(prefix): value for key, value in case.reference.items() if key.startswith(prefix)}
    return {**found, "real": found["attention_mask"].bool()}


def to_ids(case: Case, layout: torch.Tensor) -> torch.Tensor:
    """The fixture's ids, in which -1 is the place of an image token, with the package's id for it."""
    marker = case.facts["image_slot_marker_in_layout_ids"]
    return layout.masked_fill(layout == marker, case.model.config.image_token_id)


def forward(case: Case, name: str) -> dict[str, torch.Tensor]:
    """One training step on the package's own batch: what the language model is given, logits, loss and gradient."""
    model = case.model.train()
    model.zero_grad()
    batch = dict(case.once(collate, name)[0])
    del batch["label_positions"]  # all positions are scored, not only those that the trainer needs
    with embeddings_of(model) as embeddings:
        outputs = model(**batch)
    outputs.loss.backward()
    found = {"logits": outputs.logits.detach(), "loss": outputs.loss.detach(), "gradient": gradient(model)}
    return {"inputs_embeds": embeddings[0].detach(), **found}


@contextmanager
def embeddings_of(model: MiniGPT4ForConditionalGeneration) -> Iterator[list[torch.Tensor]]:
    """What the language model is given in every forward pass while this is open."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"])

    hook = model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def trainer_step(case: Case, name: str) -> dict[str, torch.Tensor]:
    """The same step as the recipes' trainer takes it: answers alone are scored, and pads are not masked."""
    batch, _, trainer = case.once(collate, name)
    trainer.model.train()
    tokens = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens)
    loss.backward()
    return {"loss": loss.detach(), "gradient": gradient(trainer.model)}


def gradient(model: MiniGPT4ForConditionalGeneration) -> torch.Tensor:
    """Gradient of everything that trains, as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])


# ---- generation -----------------------------------------------------------------------------------------------------


def ask(case: Case, chats: Any, numbers: list[int], **options: Any) -> dict[str, torch.Tensor]:
    """Chats as inputs of `generate`, as a user makes them, with the fixture's pixels."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt", **options}
    return with_pixels(case, case.processor.apply_chat_template(chats, **options), numbers)


def reply(case: Case, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """What `generate` returns for greedy replies of at most 12 tokens, with the new ids alone in `sequences`."""
    defaults = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    defaults |= {"return_dict_in_generate": True, "output_scores": True}
    outputs = case.model.eval().generate(**inputs, **{**defaults, **options})
    outputs.sequences = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    return outputs


def question(case: Case, number: int, text: str) -> dict[str, Any]:
    """A user's message about a picture; `text` is the original's whole prompt."""
    words = re.search(r"</Img> (.*) ###", text)[1]
    parts = [{"type": "image", "image": picture(case, number)}, {"type": "text", "text": words}]
    return {"role": "user", "content": parts}


def about_one(case: Case, number: int) -> dict[str, torch.Tensor]:
    """The question about one picture, in the format of the second training stage."""
    message = question(case, number, case.facts["generation_cases"][f"image{number}"]["prompt"])
    return ask(case, [message], [number], chat_template=translate("vicuna_v0_alignment"))


def about_two(case: Case) -> dict[str, torch.Tensor]:
    """Two questions of different lengths in one batch, padded on the left."""
    texts = case.facts["generation_cases"]["batch"]["texts"]
    chats = [[question(case, number, text)] for number, text in enumerate(texts)]
    return ask(case, chats, [0, 1], chat_template=translate("vicuna_v0_alignment"), padding=True)


@torch.no_grad()
def chat(case: Case, name: str) -> list[dict[str, Any]]:
    """Both turns of a chat, the second with the package's own first reply in its history."""
    facts = case.facts["generation_cases"]["chat"][name]
    last = facts["turns"][-1]["prompt_text"]
    system, questions = last.split("###")[0], re.findall(r"###20 21 (?:<Img>.*?</Img> )?(.*?)###22 23 ", last)
    config = chat_config(case, facts)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    turns = []
    for number, words in enumerate(questions):
        shown = [] if number else [{"type": "image", "image": picture(case, 0)}]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": words}]})
        with tokenized_apart(case) as pieces:
            inputs = ask(case, messages, [0])
        outputs = reply(case, inputs, generation_config=config, eos_token_id=2)
        (text,) = case.processor.post_process_image_text_to_text(outputs.sequences)
        messages.append({"role": "assistant", "content": text})
        turns.append({"inputs": inputs, "segments": pieces, "outputs": outputs, "text": text})
    return turns


def chat_config(case: Case, facts: dict[str, Any]) -> GenerationConfig:
    """
    The original's way to decode chats.

    Its repetition penalty counts words of the reply only. Replies end at the fixture's ids as they do at "###": the
    two stops stand for its spellings with LLaMA's tokenizer, one token (835) or two (2277, 29937).
    """
    config = copy.deepcopy(case.model.generation_config)
    config.repetition_penalty, config.penalize_prompt = facts["repetition_penalty"], False
    if facts["stops"] is not None:
        (whole,), (first, second) = facts["stops"]
        config.separator, config.separator_pieces = "###", {whole: "###", first: "##", second: "#"}
    return config


# ---- stages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """
    A comparison.

    Args:
        name: what is compared.
        compare: gives what the package has and what the original had: tensors, or anything else that has to be equal.
        relative: whether the deviation is one of norms.
    """

    name: str
    compare: Callable[[Case], tuple[Any, Any]]
    relative: bool = False

    def deviation(self, case: Case) -> float:
        """How far the package is from the original: 0 where both are the same, infinite where ids or shapes differ."""
        found, expected = self.compare(case)
        if not isinstance(expected, torch.Tensor):
            return 0.0 if found == expected else math.inf
        if found.shape != expected.shape:
            return math.inf
        if not expected.is_floating_point():
            return 0.0 if torch.equal(found, expected) else math.inf
        if self.relative:
            return float((found - expected).norm() / expected.norm())
        return float((found - expected).abs().max())

    def check(self, case: Case) -> None:
        bound = GRADIENT_BOUND if self.relative else BOUND
        deviation = self.deviation(case)
        assert deviation <= bound, f"{self.name} is {deviation:.2g} from the original's; {bound:.0e} is allowed"


@torch.no_grad()
def vision_side(case: Case, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Frozen parts as they are during training, where the Q-Former's dropout has to stay off."""
    model, pixels = case.model.train().model, case.reference["pixel_values"]
    encoder = model.vision_model
    if name == "vit_output":
        found = encoder.encoder(encoder.embeddings(pixels)).last_hidden_state
    elif name == "image_embeds":
        found = encoder(pixels).last_hidden_state
    elif name == "inputs_llama":
        found = case.model.get_image_features(pixels).pooler_output
    else:
        found = model.encode_images(pixels).last_hidden_state
    return found, case.reference[name]


def rows_ids(case: Case, name: str) -> tuple[Any, Any]:
    """
    Mask, and ids where it is 1; the rest is padding, whose ids mean nothing.

    The original pads answers and prompts apart and moves both kinds of pads to the end: every token lies where TRL's
    collator puts it.
    """
    batch, expected = case.once(collate, name)[0], reference_of(case, name)
    mask, expected_mask = batch["attention_mask"], expected["attention_mask"]
    found = batch["input_ids"].masked_fill(mask == 0, 0)
    wanted = to_ids(case, expected["layout_ids"]).masked_fill(expected_mask == 0, 0)
    return torch.stack([found, mask]), torch.stack([wanted, expected_mask])


def rows_segments(case: Case, name: str) -> tuple[Any, Any]:
    """Texts that are tokenized apart: before the picture, behind it, and the answer."""
    facts = case.facts["forward_cases"][name]
    prompts = [segment for prompt in facts["prompt_segment_ids"] or [] for segment in prompt]
    return case.once(collate, name)[1], prompts + facts["answer_ids_with_end_sym_after_truncation"]


def rows_labels(case: Case, name: str) -> tuple[Any, Any]:
    return case.once(collate, name)[0]["labels"], reference_of(case, name)["targets"]


def rows_tensor(case: Case, name: str, key: str, step: Callable[..., Any] = forward) -> tuple[Any, Any]:
    """Tensors at the places of real tokens, loss, or gradient."""
    found, expected = case.once(step, name)[key], reference_of(case, name)
    if key == "gradient":
        names = [parameter for parameter, _ in case.model.model.language_projection.named_parameters()]
        return found, torch.cat([expected[f"grad.llama_proj.{parameter}"].flatten() for parameter in names])
    if key == "loss":
        return found, expected["loss"]
    return found[expected["real"]], expected[key][expected["real"]]


def one_ids(case: Case, number: int) -> tuple[Any, Any]:
    layout = case.reference[f"generate.image{number}.layout_ids"]
    return case.once(about_one, number)["input_ids"], to_ids(case, layout)


@torch.no_grad()
def one_reply(case: Case, number: int, key: str) -> tuple[Any, Any]:
    """Greedy ids and their scores with an EOS that never comes, ids with one that does, and three beams."""
    inputs, reference = case.once(about_one, number), f"generate.image{number}."
    if key == "greedy_eos_ids":
        eos = case.facts["generation_cases"][f"image{number}"]["eos_token_id_greedy_eos"]
        return reply(case, inputs, eos_token_id=eos).sequences, case.reference[reference + key]
    outputs = reply(case, inputs, num_beams=3 if key.startswith("beam3") else 1)
    found = torch.stack(outputs.scores, 1) if key == "greedy_scores" else outputs.sequences
    return found, case.reference[reference + key]


@torch.no_grad()
def batch_inputs(case: Case) -> tuple[Any, Any]:
    """What the language model is given for a batch; left pads are whatever the pad token is, and masked."""
    inputs = case.once(about_two)
    with embeddings_of(case.model) as embeddings:
        case.model(**inputs)
    mask, expected = inputs["attention_mask"], case.reference["generate.batch.attention_mask"]
    if not torch.equal(mask, expected):
        return mask, expected
    return embeddings[0][mask.bool()], case.reference["generate.batch.inputs_embeds"][mask.bool()]


@torch.no_grad()
def batch_replies(case: Case, beams: int) -> tuple[Any, Any]:
    found = reply(case, case.once(about_two), num_beams=beams).sequences
    return found, case.reference[f"generate.batch.num_beams{beams}_ids"]


def chat_turn(case: Case, name: str, turn: int, key: str) -> tuple[Any, Any]:
    """
    A turn of a chat.

    The scores leave out that of BOS: transformers 4.30 began with a BOS wherever it generated from embeddings, which
    the repetition penalty counted as a word. Today it begins with nothing.
    """
    found, reference = case.once(chat, name)[turn], f"generate.chat_{name}.turn{turn}."
    facts = case.facts["generation_cases"]["chat"][name]["turns"][turn]
    outputs, bos = found["outputs"], case.facts["tokenizer"]["bos"]
    if key == "text":
        return found["text"], facts["text_kept_in_history"]
    if key == "segments":
        first, *others = facts["segment_ids"]
        return [[bos, *found["segments"][0]], *found["segments"][1:]], [first, *others]
    if key == "input_ids":
        return found["inputs"]["input_ids"], to_ids(case, case.reference[reference + "layout_ids"])
    if key == "ids":
        return outputs.sequences, case.reference[reference + "ids"]
    scores = torch.stack(outputs.scores, 1), case.reference[reference + "processed_scores"]
    words = [token for token in range(case.facts["llm"]["vocab_size"]) if token != bos]
    return scores[0][..., words], scores[1][..., words]


def stages_of(variant: str) -> list[Stage]:
    """Every comparison, in the order of the data: vision side, training batches, replies, chats."""
    features = "query_output" if variant == "qformer" else "image_embeds_grouped"
    names = ("vit_output", "image_embeds", features, "inputs_llama")
    stages = [Stage(name, partial(vision_side, name=name)) for name in names]
    for name in ROWS:
        stages += [
            Stage(f"{name}.input_ids", partial(rows_ids, name=name)),
            Stage(f"{name}.segments", partial(rows_segments, name=name)),
            Stage(f"{name}.labels", partial(rows_labels, name=name)),
            Stage(f"{name}.inputs_embeds", partial(rows_tensor, name=name, key="inputs_embeds")),
            Stage(f"{name}.logits", partial(rows_tensor, name=name, key="logits")),
        ]
        for whose, step in (("", forward), ("trainer.", trainer_step)):
            loss = partial(rows_tensor, name=name, key="loss", step=step)
            stages.append(Stage(f"{name}.{whose}loss", loss))
            grad = partial(rows_tensor, name=name, key="gradient", step=step)
            stages.append(Stage(f"{name}.{whose}gradient", grad, relative=True))
    return stages + _generation_stages()


def _generation_stages() -> list[Stage]:
    stages = []
    for number in (0, 1):
        stages.append(Stage(f"image{number}.input_ids", partial(one_ids, number=number)))
        for key in ("greedy_ids", "greedy_scores", "greedy_eos_ids", "beam3_ids"):
            stages.append(Stage(f"image{number}.{key}", partial(one_reply, number=number, key=key)))
    stages.append(Stage("batch.inputs_embeds", batch_inputs))
    stages += [Stage(f"batch.num_beams{beams}_ids", partial(batch_replies, beams=beams)) for beams in (1, 3)]
    for name in CHATS:
        for turn in (0, 1):
            for key in ("input_ids", "segments", "ids", "processed_scores", "text"):
                compare = partial(chat_turn, name=name, turn=turn, key=key)
                stages.append(Stage(f"chat_{name}.turn{turn}.{key}", compare))
    return stages


def first_failing_stage(variant: str, case: Case) -> str | None:
    """Name of the first stage at which the package is not the original; None if there is none."""
    for stage in stages_of(variant):
        try:
            stage.check(case)
        except AssertionError:
            return stage.name
    return None
