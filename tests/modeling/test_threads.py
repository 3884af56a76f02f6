"""One model, processor or pipeline in several threads: what each call gives is what it gives alone."""

import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import modeling_minigpt4  # noqa: F401  # registers the classes
from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor


THREADS, ROUNDS = 4, 3
QUICK = 20  # rounds of what takes little time
# Of different lengths and numbers of pictures, one of them without.
ROWS = [
    [[1, "image", 8, 30, 31]],
    [[1, 6], [1, "image", 5, "image", 3, 9, 20, 21]],
    [[1, 11, 12, 13, 14, 15, 16, 17, "image", 18]],
    [[1, 40, 41, 42], [1, 43]],
]
PIECES = {"separator": "###", "separator_pieces": {str(token): "###" for token in range(40, 140)}}


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Let threads change places as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(call: Callable[[int], Any], rounds: int) -> list[list[Any]]:
    """What `call(number)` gives in a thread of each number, a few times; what it raises is raised here."""
    found: list[list[Any]] = [[] for _ in range(THREADS)]
    start, errors = threading.Barrier(THREADS), []

    def work(number: int) -> None:
        try:
            start.wait()
            for _ in range(rounds):
                found[number].append(call(number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def check(call: Callable[[int], Any], rounds: int = ROUNDS) -> None:
    """Every call in a thread gives what it gave alone, and these are not all the same."""
    alone = [call(number) for number in range(THREADS)]
    assert in_threads(call, rounds) == [[result] * rounds for result in alone]
    assert any(result != alone[0] for result in alone)


@pytest.fixture(scope="module", params=[True, False], ids=["qformer", "no_qformer"])
def model(request: pytest.FixtureRequest, make_model: Callable) -> MiniGPT4ForConditionalGeneration:
    model = make_model(qformer=request.param)
    model.generation_config.update(**PIECES)
    return model


@pytest.fixture(scope="module")
def requests(model: MiniGPT4ForConditionalGeneration, make_inputs: Callable) -> list[dict[str, torch.Tensor]]:
    return [make_inputs(model, rows, first_image=5 * number) for number, rows in enumerate(ROWS)]


class Drawn(LogitsProcessor):
    """Sampling with a generator of one's own: noise of Gumbel's distribution, of which the largest score is drawn."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - torch.empty_like(scores).exponential_(generator=self.generator).log()


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ids.append("end")


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without_cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "several_replies": {"num_beams": 2, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "replies_penalized_only": {"generation_config": {"repetition_penalty": 1.8, "penalize_prompt": False}},
    "no_separator": {"generation_config": {"separator": ""}},
    "of_the_callers_own": {"generation_config": {"num_beams": 2, "max_new_tokens": 5}},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_replies(options: dict, model, requests) -> None:
    def call(number: int) -> Any:
        given = dict(options)
        if "generation_config" in given:
            given["generation_config"] = GenerationConfig(
                **{"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": 2, **given["generation_config"]}
            )
        else:
            given["max_new_tokens"] = 9 + number
        return model.generate(**requests[number], do_sample=False, **given).tolist()

    check(call)


def test_replies_that_are_drawn(model, requests) -> None:
    def call(number: int) -> Any:
        drawn = LogitsProcessorList([Drawn(number)])
        return model.generate(**requests[number], max_new_tokens=9, do_sample=False, logits_processor=drawn).tolist()

    check(call)


def test_replies_that_are_streamed(model, make_inputs) -> None:
    def call(number: int) -> Any:
        streamer = Kept()
        inputs = make_inputs(model, ROWS[number][-1:])
        model.generate(**inputs, max_new_tokens=9 - number, do_sample=False, streamer=streamer)
        return streamer.ids

    check(call)


@pytest.mark.parametrize("seeing", [False, True])
def test_replies_with_an_assistant(seeing: bool, model, make_model, make_inputs) -> None:
    def call(number: int) -> Any:  # transformers counts an assistant's guesses on it, so everybody has one
        text = LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        assistant = assistants[number] if seeing else LlamaForCausalLM(text).eval()
        inputs = make_inputs(model, ROWS[number][-1:])
        return model.generate(**inputs, max_new_tokens=9, do_sample=False, assistant_model=assistant).tolist()

    assistants = [make_model(qformer=model.model.qformer is not None, seed=seed) for seed in range(THREADS)]
    check(call)


@torch.no_grad()
def test_replies_to_pictures_alone(model, requests) -> None:
    def call(number: int) -> Any:
        pictures = requests[number % 3]["pixel_values"][:1]
        return model.generate(pixel_values=pictures, max_new_tokens=6, do_sample=False).tolist()

    check(call)


@pytest.mark.parametrize("keep", [0, 1, 2, [0, -1]])
def test_scores(keep: Any, model, requests) -> None:
    keep = torch.tensor(keep) if isinstance(keep, list) else keep

    @torch.no_grad()  # of a thread
    def call(number: int) -> Any:
        return model(**requests[number], logits_to_keep=keep).logits.tolist()

    check(call)


def test_losses_and_gradients(model, requests) -> None:
    weight = model.model.language_projection.weight

    def call(number: int) -> Any:
        labels = requests[number]["input_ids"]
        loss = model(**requests[number], labels=labels).loss
        (gradient,) = torch.autograd.grad(loss, weight, allow_unused=True)
        return loss.item(), None if gradient is None else gradient.tolist()

    check(call)


# ---- processor and pipeline -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed(backbones) -> tuple[MiniGPT4ForConditionalGeneration, MiniGPT4Processor]:
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts()).eval()
    torch.nn.init.normal_(model.model.language_projection.weight, std=0.5)
    parts = {"vision": backbones.vision, "language_model": backbones.language_model}
    return model, MiniGPT4Processor.from_backbones(**parts, config=model.config)


COLOURS = ["red", "blue", "green", "black"]


def chat(number: int, picture: Callable) -> list[dict[str, Any]]:
    words = ["What is it?", "Describe this image in detail, please, and more.", "Colour?", "Is it red or is it blue?"]
    content = [{"type": "image", "image": picture(COLOURS[number])}, {"type": "text", "text": words[number]}]
    return [{"role": "user", "content": content}]


def test_a_processor(composed, picture) -> None:
    processor = composed[1]

    def call(number: int) -> Any:
        texts = [f"<image> {COLOURS[number]}", "a longer text about nothing " * (number + 1)]
        options: dict[str, Any] = {"padding": True, "padding_side": ["left", "right"][number % 2]}
        if number == 3:
            options = {"padding": "max_length", "max_length": 60, "truncation": True}
        inputs = processor(text=texts, images=[picture(COLOURS[number])], **options)
        rendered = processor.apply_chat_template(
            [chat(number, picture)], tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        ids = inputs["input_ids"]
        text = processor.post_process_image_text_to_text(ids), processor.batch_decode(ids), processor.separator
        pixels = [[image.tolist() for image in found["pixel_values"]] for found in (inputs, rendered)]
        return ids, inputs["attention_mask"], rendered["input_ids"].tolist(), text, pixels

    check(call)


def test_a_processor_with_marks_of_replies(composed, picture) -> None:
    processor = composed[1]

    def call(number: int) -> Any:
        replies = [{"role": "assistant", "content": [{"type": "text", "text": "It is blue. " * (number + 1)}]}]
        found = processor.apply_chat_template(
            [chat(number, picture) + replies], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return found["assistant_masks"], found["input_ids"]

    check(call, QUICK)


def test_a_pipeline(composed, picture) -> None:
    model, processor = composed
    describe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"generate_kwargs": {"max_new_tokens": 8, "do_sample": False}, "return_full_text": False}

    def call(number: int) -> Any:
        return describe(text=chat(number, picture), **options)[0]["generated_text"]

    check(call)


# ---- training and replies at the same time --------------------------------------------------------------------------


def test_one_thread_trains_while_another_describes(model, requests) -> None:
    """The replies are those of the frozen weights, and what is learned is what is learned alone."""
    weight = model.model.language_projection.weight
    before = weight.detach().clone()

    def train(steps: int = 6) -> Sequence[float]:
        losses = []
        for step in range(steps):
            inputs = requests[step % 3]
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            losses.append(loss.item())
            loss.backward()
            model.zero_grad()
        return losses

    model.freeze_backbones()
    model.train()
    alone = model.generate(**requests[2], max_new_tokens=9, do_sample=False).tolist()
    losses, replies = train(), queue.Queue()
    done = threading.Event()

    def describe() -> None:
        while not done.is_set():
            replies.put(model.generate(**requests[2], max_new_tokens=9, do_sample=False).tolist())

    thread = threading.Thread(target=describe)
    thread.start()
    again = train()
    done.set()
    thread.join()
    model.eval()
    assert again == losses
    assert replies.qsize() and all(replies.get() == alone for _ in range(replies.qsize()))
    assert torch.equal(weight, before)
