"""Models that answer questions about pictures: any chat model of transformers, BLIP-2 and InstructBLIP, or a server.

`open_speaker` finds out which of them a folder, repository or address is.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import PIL.Image
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration  # which registers it with the Auto classes
from recipes_minigpt4.evaluation.api_speaker import ApiSpeaker
from recipes_minigpt4.evaluation.questions import Question, Sampling
from recipes_minigpt4.evaluation.replies import Said
from recipes_minigpt4.training.quantization import quantization_config
from recipes_minigpt4.utils.errors import RecipeError, one_line


BLIP2 = {"blip-2": "Question: {} Answer:", "instructblip": "{}"}  # model type → the words around a prompt
WHOLE_DIGEST = 1 << 26  # bytes; of larger files of weights, size and both ends are digested
END_BYTES = 1 << 20


@dataclass(frozen=True)
class SpeakerOptions:
    """
    How models are loaded and asked.

    Args:
        device: `cpu`, `cuda`, …; None for a GPU if there is one.
        dtype: that of the weights; `auto` for the one that is stored.
        batch_size: questions at once. Greedy replies do not depend on it.
        trust_remote_code: run code that comes with a model.
        quantization: of the language model of ours, by a name that `training/quantization.py` knows.
        backbones: where parts of ours are now, if they have moved, by their names.
        servers: whether advice names servers too.
    """

    device: str | None = None
    dtype: str = "auto"
    batch_size: int = 8
    trust_remote_code: bool = False
    quantization: str | None = None
    backbones: Mapping[str, str] = field(default_factory=dict)
    servers: bool = True


class Speaker(Protocol):
    """Whoever answers."""

    revision: str  # tells its weights and its way of asking from others

    def answer(self, questions: Sequence[Question], pictures: Sequence[PIL.Image.Image]) -> list[Said]:
        """The answers, in order, to questions about pictures that are open; all have the same sampling."""


# ---- models of transformers -----------------------------------------------------------------------------------------


class ChatSpeaker:
    """
    A model behind `AutoModelForImageTextToText` whose processor has a chat template.

    Args:
        model: the model, in evaluation mode.
        processor: its processor.
        revision: what tells its weights from others.
        batch_size: choices that are scored at once.
    """

    def __init__(self, model: Any, processor: Any, revision: str, batch_size: int = 8) -> None:
        self.model, self.processor, self.revision, self.batch_size = model, processor, revision, batch_size

    @classmethod
    def load(cls, name: str, options: SpeakerOptions) -> Self:
        """
        Load one.

        Args:
            name: folder or repository; `owner/name@revision` for one of its revisions.
            options: see `SpeakerOptions`.

        Raises:
            RecipeError: if it cannot be loaded, or has no chat template.
        """
        place, revision = _place(name)
        trusted = {"trust_remote_code": options.trust_remote_code, "revision": revision}
        device = device_of(options)
        chosen: dict[str, Any] = {"dtype": options.dtype, **trusted}
        if options.quantization is not None or options.backbones:
            chosen |= _own_options(name, options, device)
        try:
            processor: Any = AutoProcessor.from_pretrained(place, **trusted)
            # The Auto class would take `backbones` for a field of the configuration.
            kind = MiniGPT4ForConditionalGeneration if options.backbones else AutoModelForImageTextToText
            model: Any = kind.from_pretrained(place, **chosen)
        except Exception as error:  # transformers and the Hub say in many ways that something is not there
            raise RecipeError(f"The model {name} cannot be loaded ({one_line(error)}).") from error
        cls.check_template(name, processor)
        model = (model if options.quantization else model.to(device)).eval()
        return cls(model, processor, revision_of(name, model.config), options.batch_size)

    @classmethod
    def check_template(cls, name: str, processor: Any) -> None:
        """
        See that it can be asked.

        Raises:
            RecipeError: if it cannot.
        """
        if not getattr(processor, "chat_template", None):
            raise RecipeError(
                f"The processor of {name} has no chat template, so nobody knows how to ask it; save one as "
                "chat_template.jinja in its folder."
            )

    def written(self, question: Question) -> str:
        """The prompt as text, in which the processor finds the place of the picture."""
        content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
        chat = [{"role": "user", "content": content}]
        text: str = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return text

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], pictures: Sequence[PIL.Image.Image]) -> list[Said]:
        texts, sampling = [self.written(question) for question in questions], questions[0].sampling
        told: list[tuple[str, bool]] = []
        # Where tokens are drawn, one at a time: nobody's draws depend on the others in a batch.
        together = 1 if sampling.temperature else len(questions)
        for start in range(0, len(questions), together):
            torch.manual_seed(int(questions[start].key[:8], 16))
            batch = slice(start, start + together)
            told += self.complete(texts[batch], pictures[batch], sampling)
        scores = self.likelihoods([question.choices for question in questions], texts, pictures)
        return [Said(text, finished, of_choices) for (text, finished), of_choices in zip(told, scores, strict=True)]

    @torch.inference_mode()
    def complete(
        self,
        texts: Sequence[str],
        pictures: Sequence[PIL.Image.Image],
        sampling: Sampling,
        vision_features: torch.Tensor | None = None,
    ) -> list[tuple[str, bool]]:
        """
        What the model says behind prompts, and whether it ended by itself.

        Args:
            texts: the prompts, as a chat template writes them.
            pictures: one for each.
            sampling: how to answer; tokens are drawn from torch's own random numbers.
            vision_features: `last_hidden_state` of `encode_images` for the pictures, for a model that takes it, so
                that its vision side has nothing to do.
        """
        inputs = self.inputs(texts, pictures)
        if vision_features is not None:
            inputs.pop("pixel_values")
            inputs["vision_features"] = vision_features
        ids = self.model.generate(**inputs, **generation_options(sampling))
        prompt = inputs["input_ids"]
        if ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt):
            ids = ids[:, prompt.shape[1] :]  # some give the prompt back
        replies = self.processor.post_process_image_text_to_text(ids, skip_special_tokens=True)
        ends = self._ends()
        finished = [bool(len(row) < sampling.max_new_tokens or ends & set(row.tolist())) for row in ids]
        return [(reply.strip(), done) for reply, done in zip(replies, finished, strict=True)]

    def _ends(self) -> set[int]:
        """The tokens that end a reply, and those that fill up one that has ended."""
        ends = self.model.generation_config.eos_token_id
        return {*(ends if isinstance(ends, list) else [ends]), self.processor.tokenizer.pad_token_id} - {None}

    @torch.inference_mode()
    def likelihoods(
        self, choices: Sequence[Sequence[str]], texts: Sequence[str], pictures: Sequence[PIL.Image.Image]
    ) -> list[tuple[float, ...]]:
        """Log-likelihood per token of each prompt's choices: of what follows the tokens that all begin with."""
        pairs = [(place, choice) for place, of_text in enumerate(choices) for choice in of_text]
        scores: list[list[float]] = [[] for _ in texts]
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            seen = [pictures[place] for place, _ in batch]
            # Pads behind: BLIP-2's processor would put those in front between picture and words.
            prompts = self.inputs([texts[place] for place, _ in batch], seen, "right")
            inputs = self.inputs([_joined(texts[place], choice) for place, choice in batch], seen, "right")
            # The Q-Former of InstructBLIP reads the question, and no answer to it.
            inputs.update({name: value for name, value in prompts.items() if name.startswith("qformer_")})
            logits = self.model(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
            for row, (place, _) in enumerate(batch):
                prompt, ids = (side["input_ids"][row][side["attention_mask"][row] > 0] for side in (prompts, inputs))
                first = _common(prompt.tolist(), ids.tolist())
                told = logits[row, first - 1 : len(ids) - 1].float().log_softmax(-1)
                scores[place].append(float(told.gather(-1, ids[first:, None]).mean()))
        return [tuple(of_choices) for of_choices in scores]

    def inputs(self, texts: Sequence[str], pictures: Sequence[PIL.Image.Image], padding_side: str = "left") -> Any:
        """Prompts, as `written` gives them, and a picture for each, as tensors on the model's device."""
        # One text is not padded: turning pads on and off is nothing that threads can do at once to a tokenizer.
        pads = {"padding": len(texts) > 1, "padding_side": padding_side}
        return self.on_device(self._processed(texts, pictures, return_tensors="pt", **pads))

    def on_device(self, inputs: Any) -> Any:
        """What a processor has made, as the model takes it."""
        if "token_type_ids" not in inspect.signature(self.model.forward).parameters:
            inputs.pop("token_type_ids", None)  # which some tokenizers of transformers 4 tell everybody
        return inputs.to(self.model.device, self.model.dtype)

    def _processed(self, texts: Sequence[str], pictures: Sequence[PIL.Image.Image], **options: Any) -> Any:
        # As in `apply_chat_template`: a template that writes the first token itself gets no second one.
        first = self.processor.tokenizer.bos_token
        written = bool(first) and all(text.startswith(str(first)) for text in texts)
        return self.processor(
            text=list(texts),
            images=[[picture] for picture in pictures],
            add_special_tokens=not written,
            **options,
        )


class BlipSpeaker(ChatSpeaker):
    """
    BLIP-2 and InstructBLIP, which have no chat template: BLIP-2 is asked in the words of its paper.

    A BLIP-2 that was fine-tuned on chats tells the words around a prompt as `prompt_template` in its configuration.
    """

    @classmethod
    def check_template(cls, name: str, processor: Any) -> None:
        """There is none."""

    def written(self, question: Question) -> str:
        template = getattr(self.model.config, "prompt_template", None)
        return str(BLIP2[self.model.config.model_type] if template is None else template).format(question.prompt)

    def _processed(self, texts: Sequence[str], pictures: Sequence[PIL.Image.Image], **options: Any) -> Any:
        inputs = self.processor(text=list(texts), images=list(pictures), **options)
        if tokenizer := getattr(self.processor, "qformer_tokenizer", None):
            # The Q-Former of InstructBLIP counts its positions from the left, pads included.
            read = tokenizer(list(texts), **{**options, "padding_side": "right"})
            inputs.update({f"qformer_{name}": read[name] for name in ("input_ids", "attention_mask")})
        return inputs


def generation_options(sampling: Sampling) -> dict[str, Any]:
    """What `generate` is told, whatever the model's own generation configuration says."""
    options: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "num_beams": sampling.num_beams}
    if sampling.temperature:
        return {**options, "do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
    return {**options, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _joined(text: str, choice: str) -> str:
    return text + choice if text[-1:].isspace() else f"{text} {choice}"


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    length = min(len(one), len(other) - 1)
    return next((place for place in range(length) if one[place] != other[place]), length)


def device_of(options: SpeakerOptions) -> str:
    """
    Where models compute.

    Raises:
        RecipeError: if this machine has no such place.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch says in many ways that a device is not there
        reason = one_line(error).split(". ")[0].split(": ")[0]
        raise RecipeError(f"--device {device} is not there ({reason}); name cpu or another one.") from error
    return device


def _own_options(name: str, options: SpeakerOptions, device: str) -> dict[str, Any]:
    """What `from_pretrained` is told of what only models of this package know."""
    config = config_named(name, options)
    if config.model_type != "minigpt4":
        given = "--quantization" if options.quantization else f"--{next(iter(options.backbones))}"
        raise RecipeError(f"{given} is for models of this package, and {name} is a {config.model_type}; leave it out.")
    own: dict[str, Any] = {"backbones": dict(options.backbones)} if options.backbones else {}
    if options.quantization is None:
        return own
    stored = getattr(config, "dtype", None) if options.dtype == "auto" else getattr(torch, options.dtype)
    dtype = stored if isinstance(stored, torch.dtype) else torch.bfloat16
    return {**own, "quantization_config": quantization_config(options.quantization, dtype), "device_map": {"": device}}


# ---- names ----------------------------------------------------------------------------------------------------------


def open_speaker(name: str, options: SpeakerOptions) -> Speaker:
    """
    Load the model of a name.

    Args:
        name: a folder, a repository, or `openai:URL#MODEL`.
        options: see `SpeakerOptions`.

    Raises:
        RecipeError: if that fails.
    """
    if name.startswith("openai:"):
        return ApiSpeaker(name, options.batch_size)
    config = config_named(name, options)
    return (BlipSpeaker if config.model_type in BLIP2 else ChatSpeaker).load(name, options)


def revision_named(name: str, options: SpeakerOptions) -> str:
    """
    The `revision` that the speaker of a folder or repository has, without loading its weights.

    Raises:
        RecipeError: if there is no model.
    """
    return revision_of(name, config_named(name, options))


def config_named(name: str, options: SpeakerOptions) -> Any:
    """
    The configuration of a folder or repository.

    Raises:
        RecipeError: if there is no model.
    """
    place, revision = _place(name)
    try:
        return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # see above
        is_path = name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().exists()
        reason = "there is no such folder" if is_path else one_line(error)
        if name.startswith("openai:"):
            reason = "it is a server, and this command loads the model itself"
        ways = "a folder, a repository, or openai:URL#MODEL" if options.servers else "a folder or a repository"
        raise RecipeError(f"There is no model at {name} ({reason}); name {ways}.") from error


def _place(name: str) -> tuple[str, str | None]:
    """Folder or repository, and the revision that a repository is wanted in."""
    if Path(name).expanduser().exists():
        return str(Path(name).expanduser()), None
    place, _, revision = name.partition("@")
    return place, revision or None


def revision_of(name: str, config: Any) -> str:
    """What tells a model's weights from others: the commit of a repository, a digest of a folder's files."""
    place, revision = _place(name)
    if not Path(place).is_dir():
        return str(getattr(config, "_commit_hash", None) or revision or name)
    digest = hashlib.sha256()
    patterns = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*/adapter_*")
    for path in sorted({path for pattern in patterns for path in Path(place).glob(pattern)}):
        if path.name == "trainer_state.json":
            continue
        digest.update(json.dumps([str(path.relative_to(place)), path.stat().st_size]).encode())
        with path.open("rb") as file:
            if path.stat().st_size <= WHOLE_DIGEST:
                digest.update(file.read())
            else:
                digest.update(file.read(END_BYTES))
                file.seek(-END_BYTES, 2)
                digest.update(file.read())
    return digest.hexdigest()[:32]
