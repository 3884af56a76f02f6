"""Chats and questions of one's own for stage 2: several turns, several pictures, and loss on the answers alone."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from coloured import COLOURS
from damaged import write_tar
from PIL import Image

from processing_minigpt4 import MiniGPT4DataCollator, load_chat_template
from recipes_minigpt4 import stage2_finetune
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.collator import StageCollator
from recipes_minigpt4.data.formatting import INSTRUCTIONS, stage2_rows
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.utils.errors import RecipeError


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


pytestmark = pytest.mark.usefixtures("own_cache")


def llava(*turns: str, **row: object) -> dict:
    """A row of LLaVA's, whose turns are the human's and the model's in turn."""
    said = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]
    return {"id": "7", **row, "conversations": said}


TURNS = llava("<image>\nWhat is it?", "A square.", "Which colour?", "It is red.", image="0.png")
TWO = llava("<image>\nThis?", "A red one.", "And <image>?", "A green one.", image=["0.png", "1.png"])


def write(folder: Path, *rows: dict, name: str = "chats.json") -> Path:
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return folder / name


def as_messages(row: dict, parts: bool = False) -> dict:
    """The same chat as `messages` and `images`."""
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    messages = [
        {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
        for turn in row["conversations"]
    ]
    for message in messages if parts else ():
        texts = message["content"].split("<image>")
        content = [{"type": "text", "text": texts[0]}] if texts[0] else []
        message["content"] = content + [p for t in texts[1:] for p in ({"type": "image"}, {"type": "text", "text": t})]
    return {"messages": messages, "images": images}


def rows_of(processor, source: Path, **fields):
    args = DataArguments(dataset_name=str(source), shuffle_buffer=1, **fields)
    return stage2_rows(load_pairs(args, stage=2), processor, args)


def seen(processor, rows, count: int = 1) -> list[tuple[str, list[str]]]:
    """What the model sees of rows – its text, a picture as `<image>` –, and the stretches that it learns."""
    batch = StageCollator(processor, completion_only_loss=True)(list(itertools.islice(iter(rows), count)))
    found = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        stretches = [
            processor.decode([label for _, label in group])
            for is_learned, group in itertools.groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != -100)
            if is_learned
        ]
        found.append((processor.decode(ids).rstrip("<unk>"), stretches))
        assert all(label in (-100, id) for id, label in zip(ids, labels, strict=True))
    return found


VICUNA = "<s>###Human: <Img><image></Img> "


@pytest.mark.parametrize("form", ["llava.json", "llava.jsonl", "messages", "parts", "texts and parts", "streamed"])
def test_all_answers_of_a_chat_are_learned_and_nothing_else(form: str, folder: Path, compose: Callable) -> None:
    processor = compose(chat_template="vicuna_v0")[1]
    source = {
        "llava.json": lambda: write(folder, TURNS),
        "llava.jsonl": lambda: write(folder, TURNS, name="chats.jsonl"),
        "messages": lambda: write(folder, as_messages(TURNS), name="chats.jsonl"),
        "parts": lambda: write(folder, as_messages(TURNS, parts=True), name="chats.jsonl"),
        "texts and parts": lambda: write(
            folder, as_messages(TURNS, parts=True), as_messages(TURNS), name="chats.jsonl"
        ),
        "streamed": lambda: write(folder, TURNS, name="chats.jsonl"),
    }[form]()
    rows = rows_of(processor, source, streaming=form == "streamed")
    text = f"{VICUNA}What is it? ###Assistant: A square.###Human: Which colour? ###Assistant: It is red.###"
    assert seen(processor, rows) == [(text, ["A square.###", "It is red.###"])]
    (picture,) = next(iter(rows))["images"]
    assert picture.getpixel((4, 3)) == COLOURS[0]


@pytest.mark.parametrize("ending", ["###", " ###\n", "####"])
def test_an_answer_that_brings_the_separator_learns_it_once(ending: str, folder: Path, compose: Callable) -> None:
    """In chats, and in plain answers; elsewhere in an answer it is text, and so it is where EOS ends answers."""
    processor = compose(chat_template="vicuna_v0")[1]
    rows = rows_of(
        processor, write(folder, llava("This?", "A ## b" + ending, "Sure?", "Red." + ending, image="0.png"))
    )
    assert [learned for _, learned in seen(processor, rows)] == [["A ## b###", "Red.###"]]
    plain = write(folder, {"image": "0.png", "text": "A ### b" + ending}, name="plain.jsonl")
    assert rows_of(processor, plain)[0]["completion"] == "A ### b###"
    processor = compose(chat_template="llama2")[1]
    assert rows_of(processor, plain)[0]["completion"] == "A ### b" + ending + "</s>"


def test_the_line_says_what_is_read(folder: Path, compose: Callable, capsys) -> None:
    rows_of(compose()[1], source := write(folder, TURNS))
    assert f"data: image and conversations of {source}\n" in capsys.readouterr().out
    rows_of(compose()[1], source := write(folder, as_messages(TURNS), name="chats.jsonl"))
    assert f"data: images and messages of {source}\n" in capsys.readouterr().out


def test_stage1_takes_the_text_beside_chats_and_stage2_the_chats(folder: Path, capsys) -> None:
    args = DataArguments(dataset_name=str(write(folder, {**TURNS, "text": "A square."}, name="chats.jsonl")))
    for stage, taken in ((1, "text"), (2, "conversations")):
        load_pairs(args, stage=stage)
        assert f"data: image and {taken} of " in capsys.readouterr().out


@pytest.mark.parametrize("as_parts", [False, True])
def test_several_pictures_stand_where_they_are_placed(as_parts: bool, folder: Path, compose: Callable) -> None:
    processor = compose(chat_template="vicuna_v0")[1]
    rows = rows_of(processor, write(folder, as_messages(TWO, as_parts), name="chats.jsonl"))
    row = rows[0]
    assert [picture.getpixel((4, 3)) for picture in row["images"]] == COLOURS[:2] and row["asked"] == 1
    ((text, learned),) = seen(processor, rows)
    assert text.startswith(f"{VICUNA}This? ###Assistant: A red one.###Human: And <Img><image></Img> ?")
    assert learned == ["A red one.###", "A green one.###"]


def test_pictures_in_parts_and_pictures_without_a_place(folder: Path, compose: Callable) -> None:
    processor = compose(chat_template="vicuna_v0")[1]
    own = [{"type": "image", "image": str(folder / "1.png")}, {"type": "text", "text": "This?"}]
    chat = [{"role": "user", "content": own}, {"role": "assistant", "content": "Green."}]
    source = write(folder, {"messages": chat})
    assert seen(processor, rows_of(processor, source)) == [(f"{VICUNA}This? ###Assistant: Green.###", ["Green.###"])]
    source = write(folder, llava("This?", "Red.", image="0.png"))
    assert seen(processor, rows_of(processor, source)) == [(f"{VICUNA}This? ###Assistant: Red.###", ["Red.###"])]


def test_other_templates_end_answers_in_their_way(folder: Path, compose: Callable) -> None:
    processor = compose(chat_template="llama2")[1]
    ((text, learned),) = seen(processor, rows_of(processor, write(folder, TURNS)))
    assert text.startswith("<s>[INST] <Img><image></Img> What is it? [/INST] A square.")
    assert learned == ["A square.", "It is red.</s>"]
    processor = compose()[1]
    processor.tokenizer.chat_template = CHATML
    rows = rows_of(processor, write(folder, TURNS), instruction_template="wrapped")
    ((text, learned),) = seen(processor, rows)
    assert "assistant\nA square.</s>\n<|im_start|>user\nWhich colour?</s>" in text
    assert learned == ["A square.</s>", "It is red.</s>"]


def test_a_chat_is_as_transformers_own_mask_has_it(folder: Path, compose: Callable) -> None:
    processor = compose(chat_template="vicuna_v0")[1]
    ours = StageCollator(processor, completion_only_loss=True)([rows_of(processor, write(folder, TWO))[0]])
    processor.chat_template = load_chat_template("vicuna_v0_alignment")
    pictures = [Image.open(folder / name) for name in TWO["image"]]
    messages = as_messages(TWO, parts=True)["messages"]
    for message in messages:
        message["content"] = [
            {**part, "text": part["text"].strip()} if part["type"] == "text" else part for part in message["content"]
        ]
    theirs = MiniGPT4DataCollator(processor, assistant_only_loss=True)([{"messages": messages, "images": pictures}])
    for name in ("input_ids", "labels", "pixel_values"):
        assert ours[name].tolist() == theirs[name].tolist(), name


def test_a_chat_ends_with_the_first_answer_that_is_too_long(folder: Path, compose: Callable) -> None:
    processor = compose(chat_template="vicuna_v0")[1]
    chat = llava("<image>\nWhat?", "A square.", "More of <image>?", "q" * 90, "And?", "No.", image=["0.png", "1.png"])
    rows = rows_of(processor, write(folder, chat), max_txt_len=30)
    ((text, learned),) = seen(processor, rows)
    assert learned == ["A square.###", "q" * 30] and text.endswith("Assistant: " + "q" * 30)


def test_image_in_an_answer_is_text(folder: Path, compose: Callable) -> None:
    processor = compose(chat_template="vicuna_v0")[1]
    rows = rows_of(processor, write(folder, llava("<image>\nWhat?", "The tag <image>.", image="0.png")))
    batch = StageCollator(processor, completion_only_loss=True)([rows[0]])
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == processor.num_image_tokens
    assert seen(processor, rows)[0][1] == ["The tag <image>.###"]


# ---- questions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("question", ["question", "instruction"])
def test_every_row_may_have_its_question(question, streaming, folder: Path, compose: Callable, capsys) -> None:
    processor = compose(chat_template="vicuna_v0")[1]
    texts = ["Which colour?", "<image>\nHow many?", ""]
    rows = [{"image": f"{n}.png", question: text, "answer": "One."} for n, text in enumerate(texts)]
    source = write(folder, *rows, name="vqa.jsonl")
    prompts = [row["prompt"] for row in itertools.islice(rows_of(processor, source, streaming=streaming), 3)]
    assert f"data: image, {question} and answer of {source}\n" in capsys.readouterr().out
    assert {f"{VICUNA}{text} ###Assistant: " for text in ("Which colour?", "How many?")} < set(prompts)
    assert sum(any(text in prompt for text in INSTRUCTIONS) for prompt in prompts) == 1
    assert all("learned" not in row for row in itertools.islice(rows_of(processor, source), 3))


def test_captions_questions_and_chats_are_mixed(folder: Path, compose: Callable) -> None:
    processor = compose(chat_template="vicuna_v0")[1]
    sources = [
        write(folder, {"image": "0.png", "caption": "A caption."}, name="captions.jsonl"),
        write(folder, {"image": "1.png", "question": "Which?", "answer": "Green."}, name="vqa.jsonl"),
        write(folder, TWO, llava("no picture", "x")),
    ]
    args = DataArguments(dataset_name=[str(source) for source in sources], max_bad_share=1, shuffle_buffer=1)
    rows = list(itertools.islice(stage2_rows(load_pairs(args, stage=2), processor, args), 40))
    batch = StageCollator(processor, completion_only_loss=True)(rows)
    skipped = batch["sample_counts"]["skipped"]
    assert {record["cause"] for record in skipped} == {"no picture"} and 0 < len(skipped) < 20
    good = [row for row in rows if not row["skipped"]]
    answers = {tuple(learned) for _, learned in seen(processor, good, len(good))}
    assert answers == {("A caption.###",), ("Green.###",), ("A red one.###", "A green one.###")}
    assert len(batch["pixel_values"]) == sum(len(row["images"]) for row in good)


def test_tars_hold_chats_and_questions_as_well(folder: Path, compose: Callable, capsys) -> None:
    processor = compose(chat_template="vicuna_v0")[1]
    picture = (folder / "0.png").read_bytes()
    chats = [json.dumps({"image": "0.png", "conversations": row["conversations"]}).encode() for row in (TURNS, TWO)]
    source = write_tar(folder / "a.tar", [(str(n), {"png": picture, "json": chat}) for n, chat in enumerate(chats)])
    rows = list(itertools.islice(rows_of(processor, source), 2))
    assert f"data: image and conversations of {source}\n" in capsys.readouterr().out
    assert seen(processor, rows)[0][1] == ["A square.###", "It is red.###"]
    assert rows[1]["skipped"]["cause"] == "broken chat"
    asked = {"question": "Which?", "answer": "Red.", "key": "7"}
    source = write_tar(folder / "b.tar", [("0", {"png": picture, "json": json.dumps(asked).encode()})])
    ((text, learned),) = seen(processor, rows_of(processor, source))
    assert (text, learned) == (f"{VICUNA}Which? ###Assistant: Red.###", ["Red.###"])
    assert "question and answer of" in capsys.readouterr().out


# ---- mistakes and runs ----------------------------------------------------------------------------------------------


BROKEN = {
    "no picture": llava("What?", "A square."),
    "no answer": llava("<image>\nWhat?", image="0.png"),
    "an empty answer": llava("<image>\nWhat?", " ", image="0.png"),
    "too few pictures": llava("<image><image>\nWhat?", "A square.", image="0.png"),
    "another role": {"image": "0.png", "conversations": [{"from": "tool", "value": "x"}]},
    "no turns": {"image": "0.png", "conversations": []},
    "a missing file": llava("<image>\nWhat?", "A square.", image="9.png"),
}
CAUSES = ["no picture", "no answer", "no answer", "broken chat", "broken chat", "broken chat", "missing file"]


def test_chats_that_cannot_be_used_are_skipped_by_cause(folder: Path, compose: Callable) -> None:
    rows = rows_of(compose()[1], write(folder, *BROKEN.values(), TURNS), max_bad_share=1)
    skipped = [row["skipped"] for row in rows]
    assert [record and record["cause"] for record in skipped] == [*CAUSES, None]
    assert "1 pictures for 2 places" in skipped[3]["name"] and "'tool'" in skipped[4]["name"]


def test_chats_that_cannot_be_read_get_a_sentence(folder: Path) -> None:
    source = str(write(folder, TURNS))
    with pytest.raises(RecipeError, match=r"holds chats in the column 'conversations', which stage 2 reads; .*\.$"):
        load_pairs(DataArguments(dataset_name=source), stage=1)
    both = {"image": "0.png", "question": "a", "instruction": "b", "answer": "c"}
    with pytest.raises(RecipeError, match=r"several columns of instructions, question and instruction; remove one\.$"):
        load_pairs(DataArguments(dataset_name=str(write(folder, both))), stage=2)
    source = str(write(folder, BROKEN["a missing file"]))
    with pytest.raises(RecipeError, match=r"1 of 1 pictures are missing, .*9\.png among them; .*--image_folder"):
        load_pairs(DataArguments(dataset_name=source), stage=2)


def test_chats_need_a_tokenizer_that_tells_places(folder: Path, compose: Callable, monkeypatch) -> None:
    processor = compose()[1]
    monkeypatch.setattr(type(processor.tokenizer), "is_fast", False)
    with pytest.raises(RecipeError, match=r"^Chats need a fast tokenizer, .*\.$"):
        rows_of(processor, write(folder, TURNS))


@pytest.mark.parametrize("kind", ["chats", "questions"])
def test_stage2_trains_on_them(kind: str, folder: Path, stage: Callable, capsys) -> None:
    rows = [{"image": "0.png", "question": "Which?", "answer": "Red."}] if kind == "questions" else [TURNS, TWO]
    source = write(folder, *rows * 4)
    fields = {"dataset_name": source, "panel_steps": 2, "max_length": 400, "chat_template": "vicuna_v0"}
    trainer = stage2_finetune.main(stage(**fields))
    assert trainer.state.global_step == 2 and trainer.state.log_history[0]["loss"] > 0
    assert "none skipped" in capsys.readouterr().out
    assert (Path(trainer.args.output_dir) / "panel.html").is_file()


def test_features_of_chats_are_not_cached(folder: Path, stage: Callable, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"not for chats; leave out --cache_features\.$"):
        stage2_finetune.main(stage(dataset_name=write(folder, TURNS), cache_features=tmp_path / "features"))
