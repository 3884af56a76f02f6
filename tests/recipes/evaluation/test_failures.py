"""The rules for failing replies beside people's labels, and the words and sentences that they count."""

import pytest
from PIL import Image

from recipes_minigpt4.evaluation.judging import agreement
from recipes_minigpt4.evaluation.languages import is_english
from recipes_minigpt4.evaluation.questions import Picture, Question
from recipes_minigpt4.evaluation.replies import Reply, Said, reply_to
from recipes_minigpt4.evaluation.suites.failures import PROMPTS, Failures, broken_rules
from recipes_minigpt4.evaluation.words import (
    content_share,
    is_finished,
    repeated_share,
    sentences_of,
    stutters,
    words_of,
    yes_or_no,
)


POEM = (
    "Golden light upon the sea,\nwaves that whisper soft to me,\na boat that drifts away,\nat the closing of the day"
)
REFRAIN = "O little boat upon the sea,\ncome home to me, come home to me.\nThe night is cold, the stars are few,\n"
LABELLED = [  # kind, reply, whether it ended by itself, the rules by which a person says it fails
    ("detailed", "The image shows a red car on a wet street. A man with an umbrella walks by.", True, []),
    ("detailed", "A dog lies on the grass. It holds a yellow ball in its mouth. The sun is shining.", True, []),
    ("detailed", 'The sign says "Stop here." Two people wait beside it (one of them is a child).', True, []),
    (
        "detailed",
        "The kitchen has a stove, a sink and a fridge. The walls are white. The floor is white too.",
        True,
        [],
    ),
    ("detailed", "Is this a café? It looks like one: there are tables, chairs and a counter!", True, []),
    (
        "detailed",
        "There are three bowls on the table:\n1. A bowl of rice.\n2. A bowl of soup.\n3. A bowl of fruit.",
        True,
        [],
    ),
    ("detailed", "It is a very, very long train that crosses the bridge.", True, []),
    ("detailed", "A plate with a croissant, a baguette and a crème brûlée stands on the table.", True, []),
    ("detailed", "The picture is dark.", True, []),
    ("detailed", "On the left is a man. On the right is a woman. In the middle is a child.", True, []),
    ("poem", POEM, True, []),
    (
        "poem",
        POEM + ".\n" + POEM.replace("Golden", "Silver").replace("sea", "lake").replace("day", "year"),
        True,
        ["repetition"],
    ),
    ("poem", REFRAIN + "O little boat upon the sea,\ncome home across the waves to me.", True, []),
    (
        "poem",
        "Roses bloom in morning light,\nbirds take off in early flight,\nall the world is fresh and bright.",
        True,
        [],
    ),
    ("poem", "", True, ["empty"]),
    ("detailed", "", True, ["empty"]),
    ("detailed", " ###\n", True, ["empty"]),
    ("detailed", "…", True, ["empty"]),
    (
        "detailed",
        "A man is standing on a street. A man is standing on a street. A man is standing on a street.",
        True,
        ["repetition"],
    ),
    (
        "detailed",
        "The room has a large bed. There is a lamp beside it. The room has a large bed.",
        True,
        ["repetition"],
    ),
    ("detailed", "A cat on a cat on a cat on a cat on a cat.", True, ["repetition"]),
    ("detailed", "The flowers are red red red and the sky is blue.", True, ["repetition"]),
    ("detailed", "The image shows a red car on a wet", False, ["unfinished"]),
    ("detailed", "The image shows a table. On the table there are", True, ["unfinished"]),
    ("detailed", "a street with cars and people", True, ["unfinished"]),
    ("poem", POEM + ",\nand the", False, ["unfinished"]),
    ("detailed", "Das Bild zeigt ein rotes Auto auf einer nassen Straße.", True, ["language"]),
    ("detailed", "L'image montre un chat sur la table.", True, ["language"]),
    ("detailed", "La imagen muestra un perro en el parque.", True, ["language"]),
    ("detailed", "图片中有一只狗坐在草地上。", True, ["language"]),
    ("detailed", "На картинке изображена собака, лежащая на траве.", True, ["language"]),
    (
        "detailed",
        "The image shows a dog on the grass. Der Hund liegt auf dem Rasen und schläft in der Sonne.",
        True,
        ["language"],
    ),
    # Where rules and people differ.
    ("detailed", "Dog dog, the dog: a dog, dogs.", True, ["repetition"]),
    (
        "detailed",
        "The man is wearing a hat, and the woman is wearing a hat, and the boy is wearing a hat, and the girl is "
        "wearing a hat.",
        True,
        ["repetition"],
    ),
    ("poem", "Row, row, row the boat,\ngently down the stream", True, []),
]
DIFFERENT = 3  # fmt: skip


def reply(kind: str, text: str, finished: bool | None = True) -> Reply:
    question = Question(Picture("a", Image.new("RGB", (4, 4))), PROMPTS[kind], facts={"kind": kind})
    return reply_to(question, "r", Said(text, finished))


@pytest.mark.parametrize("number", range(len(LABELLED) - DIFFERENT))
def test_rules_say_what_people_say(number: int) -> None:
    kind, text, finished, failures = LABELLED[number]
    assert broken_rules(reply(kind, text, finished)) == failures


def test_agreement_of_the_rules_with_people() -> None:
    suite = Failures()
    people = [(bool(failures),) for _, _, _, failures in LABELLED]
    rules = [suite.own_verdict(reply(kind, text, finished)) for kind, text, finished, _ in LABELLED]
    told = agreement(rules, people)
    assert told["answers"] == len(LABELLED) == 35
    assert told["same"] == 32 / 35
    assert told["kappa"] == pytest.approx(14 / 17)


def test_shares_count_each_prompt_for_itself() -> None:
    suite = Failures()
    replies = [reply("detailed", "A dog."), reply("poem", ""), reply("detailed", "A dog"), reply("poem", "A dog")]
    parts = suite.parts(replies, [None] * 4)
    assert parts["detailed"] == [(0, 1), None, (1, 1), None]
    assert parts["poem"] == [None, (1, 1), None, (0, 1)]
    assert [part.above for part in parts["empty"]] == [0, 1, 0, 0]
    assert [part.above for part in parts["unfinished"]] == [0, 0, 1, 0]


def test_a_judge_is_asked_with_the_prompt_and_the_reply() -> None:
    suite = Failures()
    case = suite.case(reply("poem", "Roses"))
    assert PROMPTS["poem"] in case.request and "Reply: Roses" in case.request and len(case.questions) == 1
    assert suite.read_verdict(case.reply, "Yes.") == (True,)


ENGLISH = {
    "A red circle.": True,
    "red circle, small blue star": True,
    "small red circle top left, big blue square bottom right": True,
    "The naïve fiancé ordered a piña colada at the café.": True,
    "C'est la vie, as they say in France.": True,
    "la la la, sings the bird": True,
    "Vincent van Gogh painted De Sterrennacht and La Berceuse.": True,
    "Een rode cirkel op een witte achtergrond.": False,
    "Il gatto dorme sul divano.": False,
    "Uma imagem com um gato.": False,
    "Na obrazie jest kot, który śpi.": False,
    "Kırmızı bir daire ve mavi bir kare.": False,
    "Một con mèo đang ngủ trên ghế.": False,
    "Gambar ini menunjukkan seekor kucing yang tidur di sofa.": False,
    "画像には猫がいます。": False,
    "그림에는 고양이가 있습니다.": False,
    "lorem ipsum dolor sit amet consectetur adipiscing elit sed eiusmod tempor incididunt labore dolore": False,
    "": True,
    "12 34": True,
}


@pytest.mark.parametrize("text", ENGLISH)
def test_language_of_short_texts(text: str) -> None:
    assert is_english(text) is ENGLISH[text]


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes", True), ("no.", False), ("**Yes**, it does.", True), ("No, it does not say yes.", None),
     ("The answer is yes.", True), ("Answer: (no)", False), ("It repeats itself, so yes.", True),
     ("Yes and no.", None), ("yes or no", None), ("yes/no", None), ("", None), ("Maybe.", None),
     ("There is no doubt about it.", None), ("No, on the whole yes", None), ("Nothing", None)],
)  # fmt: skip
def test_yes_or_no(text: str, said: bool | None) -> None:
    assert yes_or_no(text) is said


def test_words_and_sentences() -> None:
    assert words_of("It’s a T-shirt, 3 of them; don't!") == ["it’s", "a", "t", "shirt", "3", "of", "them", "don't"]
    assert sentences_of('He said "Stop." Then\nhe left! Why?') == ['He said "Stop.', "Then", "he left!", "Why?"]
    assert (
        is_finished('He said "Stop."')
        and is_finished("**Done.**")
        and not is_finished("Done, and")
        and not is_finished("")
    )
    assert repeated_share([*"abcdabcd"]) == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repeated_share([*"abc"]) == 0
    assert stutters(["so", "very", "very", "very", "good"]) and stutters([*"ababab"])
    assert not stutters(["very", "very", "good"]) and not stutters(["a", "a1", "a2"])


def test_share_of_content_words() -> None:
    assert content_share("A dog on the grass", "the grass, and a dog") == 1
    assert content_share("A dog on the grass", "a cat on the grass") == 0.5
    assert content_share("on the", "") == 1
