"""`generate`: every way of decoding, batches equal to one-by-one, and where replies end."""

import copy

import pytest
import torch
from closeness import assert_close
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4ImageProcessor, MiniGPT4Processor


# Different lengths and numbers of pictures, so that rows are padded and pictures are not one per row.
ROWS = [[1, "image", 8, 30, 31], [1, 6], [1, "image", 5, "image", 3, 9, 20, 21]]
LENGTH = 8
FIXED = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "pad_token_id": 0}
GREEDY = {**FIXED, "do_sample": False}


@pytest.fixture(scope="module", params=[True, False], ids=["qformer", "no_qformer"])
def model(request, make_model) -> MiniGPT4ForConditionalGeneration:
    return make_model(qformer=request.param)


def reply(model, inputs: dict, **options) -> torch.Tensor:
    """The new ids only."""
    given = inputs.get("input_ids", inputs.get("inputs_embeds"))
    start = 0 if "inputs_embeds" in inputs else given.shape[1]
    return model.generate(**inputs, **options)[:, start:]


def by_hand(model, inputs: dict, length: int) -> torch.Tensor:
    """Greedy decoding with whole forward passes and no cache."""
    ids, mask, images = inputs["input_ids"], inputs["attention_mask"], inputs.get("pixel_values")
    for _ in range(length):
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=images).logits[:, -1]
        logits[:, 2] = -torch.inf  # no EOS
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, -length:]


def one_by_one(model, make_inputs, rows: list, **options) -> list[list[int]]:
    replies, first = [], 0
    for row in rows:
        replies.append(reply(model, make_inputs(model, [row], first_image=first), **options)[0].tolist())
        first += row.count("image")
    return replies


# ---- ways of decoding ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_is_the_best_token_step_by_step(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS)
    expected = by_hand(model, inputs, LENGTH)
    assert reply(model, inputs, **GREEDY).tolist() == expected.tolist()
    assert reply(model, inputs, **GREEDY, use_cache=False).tolist() == expected.tolist()
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    changed = reply(model, other, **GREEDY)
    assert changed[0].tolist() != expected[0].tolist()
    assert changed[1].tolist() == expected[1].tolist()


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams_without_cache": {"num_beams": 3, "use_cache": False},
    "no_repeated_pairs": {"num_beams": 2, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@torch.no_grad()
def test_a_batch_gets_the_replies_of_its_rows_alone(model, make_inputs, options: dict) -> None:
    together = reply(model, make_inputs(model, ROWS), **GREEDY, **options).tolist()
    assert together == one_by_one(model, make_inputs, ROWS, **GREEDY, **options)
    assert len({tuple(row) for row in together}) == len(ROWS)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [True, False])
def test_repetition_penalty_counts_the_words_of_the_prompt_or_not(model, make_inputs, prompt: bool) -> None:
    """As with any model of transformers, or as in the original; image placeholders have no score to be lowered."""
    # A prompt that holds what the model would say, so that it matters.
    (words,) = one_by_one(model, make_inputs, ROWS[2:], **GREEDY)
    rows = [ROWS[2] + words, *ROWS[:2]]
    inputs = make_inputs(model, rows[:1])
    ids, start = inputs["input_ids"], inputs["input_ids"].shape[1]
    for _ in range(LENGTH):
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        seen = ids[0, 0 if prompt else start :].unique()
        seen = seen[seen != model.config.image_token_id]
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 5, logits[seen] / 5)
        logits[2] = -torch.inf  # no EOS
        ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
    config = copy.deepcopy(model.generation_config)
    config.penalize_prompt = prompt
    options = {**GREEDY, "generation_config": config, "repetition_penalty": 5.0}
    found = reply(model, inputs, **options)
    assert found.tolist() == ids[:, start:].tolist()
    assert found.tolist() != reply(model, inputs, **GREEDY).tolist()
    assert reply(model, make_inputs(model, rows), **options).tolist() == one_by_one(
        model, make_inputs, rows, **options
    )


@torch.no_grad()
def test_beams_with_several_pictures_per_row(model, make_inputs) -> None:
    inputs = make_inputs(model, [[1, "image", "image", 5], [1, "image", 7, 8, 9]])
    found = model.generate(
        **inputs, **GREEDY, num_beams=4, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
    )
    start = inputs["input_ids"].shape[1]
    repeated = {
        "input_ids": found.sequences,
        "attention_mask": torch.cat([inputs["attention_mask"].repeat_interleave(2, 0), torch.ones(4, LENGTH)], 1),
        "pixel_values": inputs["pixel_values"][[0, 1, 0, 1, 2, 2]],
    }
    logits = model(**repeated).logits[:, start - 1 : -1].log_softmax(-1)
    expected = logits.gather(-1, found.sequences[:, start:, None]).sum((1, 2)) / LENGTH
    # A beam is scored by its own pictures.
    assert_close(found.sequences_scores, expected)


@torch.no_grad()
def test_sampling_follows_the_seed(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS)
    sampled = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        sampled.append(reply(model, inputs, **FIXED, do_sample=True, top_p=0.9, temperature=1.5).tolist())
    assert sampled[0] == sampled[1] != sampled[2]


@torch.no_grad()
def test_several_samples_per_prompt_see_their_own_pictures(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS)
    found = reply(model, inputs, **FIXED, do_sample=True, top_k=1, num_return_sequences=2)  # top 1 is greedy
    assert found.tolist() == reply(model, inputs, **GREEDY).repeat_interleave(2, 0).tolist()


@torch.no_grad()
def test_static_and_dynamic_cache_agree(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS)
    expected = reply(model, inputs, **GREEDY)
    static = reply(model, inputs, **GREEDY, cache_implementation="static", disable_compile=True)
    assert static.tolist() == expected.tolist()


@pytest.mark.parametrize("assistant", ["smaller_llama", "own_language_model", "smaller_minigpt4", "prompt_lookup"])
@torch.no_grad()
def test_assisted_decoding_gives_the_same_reply(make_model, make_inputs, assistant: str) -> None:
    model = make_model()
    options = {"do_sample": False, "max_new_tokens": LENGTH, "pad_token_id": 0}
    helpers = {
        "smaller_llama": lambda: {"assistant_model": language_model_of(make_model(text={"num_hidden_layers": 1}))},
        "own_language_model": lambda: {"assistant_model": language_model_of(model)},
        "smaller_minigpt4": lambda: {"assistant_model": make_model(text={"num_hidden_layers": 1}, seed=1)},
        "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 2},
    }
    for row in ROWS:
        inputs = make_inputs(model, [row])
        expected = reply(model, inputs, **options)
        assert reply(model, inputs, **options, **helpers[assistant]()).tolist() == expected.tolist()


def language_model_of(model: MiniGPT4ForConditionalGeneration) -> LlamaForCausalLM:
    """The language model on its own, which knows nothing of pictures."""
    alone = LlamaForCausalLM(copy.deepcopy(model.config.text_config)).eval()
    alone.model.load_state_dict(model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    return alone


@torch.no_grad()
def test_streamers_get_every_token_as_it_comes(model, make_inputs, tokenizer) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.pieces, self.ended = [], False

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    inputs = make_inputs(model, ROWS[:1])
    streamer = Collect()
    expected = reply(model, inputs, **GREEDY, streamer=streamer)[0].tolist()
    assert streamer.ended
    assert streamer.pieces == [inputs["input_ids"][0].tolist()] + [[token] for token in expected]
    text = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, **GREEDY, streamer=text)
    assert "".join(text) == tokenizer.decode(expected)


@torch.no_grad()
def test_a_processor_does_where_transformers_takes_a_tokenizer(model, make_inputs, tokenizer) -> None:
    """As servers of transformers give it for `stop_strings`."""
    processor = MiniGPT4Processor(MiniGPT4ImageProcessor(), tokenizer, image_token_id=model.config.image_token_id)
    inputs = make_inputs(model, ROWS[:1])
    whole = reply(model, inputs, **GREEDY)[0].tolist()
    stops = [text for text in map(tokenizer.decode, whole) if text.strip("\ufffd ")]
    found = [reply(model, inputs, **GREEDY, stop_strings=stops, tokenizer=one)[0] for one in (processor, tokenizer)]
    assert torch.equal(*found) and len(found[0]) < len(whole)


@torch.no_grad()
def test_stored_features_and_embeddings_replace_pixels(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS)
    pixels = inputs["pixel_values"]
    prompt = {name: value for name, value in inputs.items() if name != "pixel_values"}
    stored = {**prompt, "vision_features": model.model.encode_images(pixels).last_hidden_state}
    for options in (GREEDY, {**GREEDY, "num_beams": 3}, {**GREEDY, "use_cache": False}):
        assert reply(model, stored, **options).tolist() == reply(model, inputs, **options).tolist()
    features = model.get_image_features(pixels).pooler_output
    mask = model.get_placeholder_mask(inputs["input_ids"], features)
    embeds = model.get_input_embeddings()(inputs["input_ids"].masked_fill(mask, 0))
    embeds = embeds.masked_scatter(mask.unsqueeze(-1), features)
    embedded = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert reply(model, embedded, **GREEDY).tolist() == reply(model, inputs, **GREEDY).tolist()


@torch.no_grad()
def test_pictures_without_places_go_behind_bos(model, make_inputs) -> None:
    inputs = make_inputs(model, [[1, "image", 8, 30], [1, "image", 6]])
    bare = {**make_inputs(model, [[1, 8, 30], [1, 6]]), "pixel_values": inputs["pixel_values"]}
    expected = reply(model, inputs, **GREEDY)
    assert model.generate(**bare, **GREEDY)[:, -LENGTH:].tolist() == expected.tolist()
    alone = model.generate(pixel_values=inputs["pixel_values"], **GREEDY)[:, -LENGTH:]
    prompts = make_inputs(model, [[1, "image"], [1, "image"]])
    assert alone.tolist() == reply(model, prompts, **GREEDY).tolist()


def test_a_wrong_number_of_pictures_is_refused(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS)
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            model.generate(**inputs, **GREEDY, **options)


# ---- where replies end --------------------------------------------------------------------------------------------

# How a tokenizer may spell what ends a reply: its extra tokens, and the pieces in which `###` then comes.
SPELLINGS = {
    "one_token": (["###"], ["###"]),
    "three_tokens": (["#"], ["#", "#", "#"]),
    "two_and_one": (["#", "##"], ["##", "#"]),
    "across_words": ([".#", "##", "#H"], [".#", "##"]),
    "into_the_next_word": (["##", "#H"], ["##", "#H"]),
    "with_more_behind": (["####"], ["####"]),
}
WORDS = ["<pad>", "<s>", "</s>", "a", "b", "c", "d", "e", "f", "g", "h"]


def word_tokenizer(extra: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*WORDS, *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def separator_model(make_model, extra: list[str], tmp_path, backbones) -> tuple:
    """A composed model whose generation config tells the separator as the given tokenizer spells it."""
    tokenizer = word_tokenizer(extra)
    folder = tmp_path / "language_model"
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = MiniGPT4ForConditionalGeneration.from_backbones(vision=backbones.vision, language_model=folder)
    return model.eval(), tokenizer


def script(model, rows: list[list[int]], prompt_length: int) -> None:
    """Make the model say these ids, row by row, whatever it is asked."""
    vocab_size = model.config.text_config.vocab_size
    plan = torch.tensor(rows)
    state = {"step": 0}

    def speak(module, args, output):
        logits = torch.full((len(plan), output.shape[1], vocab_size), -10.0)
        logits[range(len(plan)), -1, plan[:, min(state["step"], plan.shape[1] - 1)]] = 10.0
        state["step"] += 1
        return logits

    model.lm_head.register_forward_hook(speak)


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_replies_stop_at_the_separator_row_by_row(make_model, tmp_path, backbones, spelling: tuple) -> None:
    extra, pieces = spelling
    model, tokenizer = separator_model(make_model, extra, tmp_path, backbones)
    separator = tokenizer.convert_tokens_to_ids(pieces)
    image, pad = model.config.image_token_id, 0
    # The separator in the prompt ends nothing, nor do its parts apart.
    prompt = [1, image, *separator, 4]
    said = [
        [5, *separator, 6, 7, 8, 9, 6, 7],
        [5, 6, 7, 8, *separator, 9, 6],
        [5, *separator[:-1], 6, 7, 8, 9, 6, 7] if len(separator) > 1 else [5, 6, 7, 8, 9, 6, 7],
    ]
    width = min(map(len, said))
    script(model, [row[:width] for row in said], len(prompt))
    inputs = {
        "input_ids": torch.tensor([prompt] * 3),
        "attention_mask": torch.ones(3, len(prompt), dtype=torch.long),
        "pixel_values": torch.zeros(3, 3, 28, 28),
    }
    replies = reply(model, inputs, do_sample=False, max_new_tokens=width).tolist()
    ends = [1 + len(separator), min(4 + len(separator), width), width]
    for found, row, end in zip(replies, said, ends, strict=True):
        assert found == row[:end] + [pad] * (width - end)


def test_a_separator_begun_in_the_prompt_does_not_count(make_model, tmp_path, backbones) -> None:
    model, tokenizer = separator_model(make_model, ["#"], tmp_path, backbones)
    mark = tokenizer.convert_tokens_to_ids("#")
    script(model, [[mark, 5, mark, mark, mark, 6, 7]], 3)
    inputs = {"input_ids": torch.tensor([[1, mark, mark]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert reply(model, inputs, do_sample=False, max_new_tokens=7).tolist() == [[mark, 5, mark, mark, mark]]


def test_replies_stop_at_eos(make_model, tmp_path, backbones) -> None:
    model, _ = separator_model(make_model, ["###"], tmp_path, backbones)
    script(model, [[5, 2, 6, 7, 8], [5, 6, 7, 2, 8]], 2)
    inputs = {"input_ids": torch.tensor([[1, 4]] * 2), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    assert reply(model, inputs, do_sample=False).tolist() == [[5, 2, 0, 0], [5, 6, 7, 2]]


def test_a_length_that_is_asked_for_holds_where_the_checkpoint_has_its_own(model, make_inputs) -> None:
    """Harnesses and older programs ask with `max_length`; checkpoints of ours bring `max_new_tokens`."""
    inputs = make_inputs(model, [[1, "image", 8]])
    start = inputs["input_ids"].shape[1]
    own = copy.deepcopy(model.generation_config)
    model.generation_config.update(max_new_tokens=7, min_new_tokens=3, pad_token_id=0)
    try:
        length = {name: reply(model, inputs, **options).shape[1] for name, options in {
            "the checkpoint's": {}, "asked for": {"max_length": start + 4},
            "both": {"max_length": start + 4, "max_new_tokens": 5},
            "a config": {"max_length": start + 4, "generation_config": GenerationConfig(max_new_tokens=5)},
        }.items()}  # fmt: skip
    finally:
        model.generation_config = own
    assert length == {"the checkpoint's": 7, "asked for": 4, "both": 5, "a config": 5}


def test_the_separator_can_be_switched_off(make_model, tmp_path, backbones) -> None:
    model, tokenizer = separator_model(make_model, ["###"], tmp_path, backbones)
    mark = tokenizer.convert_tokens_to_ids("###")
    inputs = {"input_ids": torch.tensor([[1, 4]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    own = GenerationConfig(max_new_tokens=4, pad_token_id=0, eos_token_id=2)  # says nothing about separators
    script(model, [[5, mark, 6, 2]], 2)
    assert reply(model, inputs, generation_config=own, do_sample=False).tolist() == [[5, mark]]
    off = copy.deepcopy(model.generation_config)
    off.separator = ""  # transformers takes None for "as the model has it"
    for options in ({"generation_config": off}, {"separator": ""}):
        script(model, [[5, mark, 6, 2]], 2)
        assert reply(model, inputs, **options, do_sample=False).tolist() == [[5, mark, 6, 2]]


def test_the_separator_survives_saving(make_model, tmp_path, backbones) -> None:
    model, tokenizer = separator_model(make_model, ["##", "#"], tmp_path, backbones)
    assert model.generation_config.separator == "###"
    assert model.generation_config.max_new_tokens == 300
    model.save_pretrained(tmp_path / "saved")
    again = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    separator = tokenizer.convert_tokens_to_ids(["##", "#"])
    script(again, [[5, *separator, 6, 7]], 2)
    inputs = {"input_ids": torch.tensor([[1, 4]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    assert reply(again, inputs, do_sample=False).tolist() == [[5, *separator]]


def test_a_separator_without_a_tokenizer_is_refused(tmp_path, backbones) -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    parts = {"vision": backbones.vision, "language_model": tmp_path}
    with pytest.raises(OSError, match=r"'###' cannot be spelt in tokens.*add one there, or pass `separator=None`"):
        MiniGPT4ForConditionalGeneration.from_backbones(**parts, separator="###")
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts, separator=None)
    assert getattr(model.generation_config, "separator", None) is None
