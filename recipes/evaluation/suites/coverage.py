"""Table 2: how many of the captions that people wrote a description covers, as a judge tells."""

import re
from collections.abc import Mapping, Sequence

from recipes_minigpt4.evaluation.questions import Question, Sampling
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.scenes import told_things
from recipes_minigpt4.evaluation.statistics import Measure, Part
from recipes_minigpt4.evaluation.suite import Case, Row, Suite, Verdict
from recipes_minigpt4.evaluation.suites.captions import captions_of, with_captions_of_both
from recipes_minigpt4.evaluation.words import yes_or_no


PROMPT = "Describe the image in detail."
CAPTIONS = 5  # that are asked about, the first of each picture
REQUEST = (  # words of the paper's appendix, with places for what is tested
    "Given a test image description and a list of gt image caption, verify whether the information in gt caption is "
    "included in the test description. The answer should be yes or no. Input is in this format: Test: (test sentence) "
    "1: (gt1) 2: (gt2) 3: (gt3) you need to answer yes or no for each gt in the following format: 1: (yes/no) 2: "
    "(yes/no) 3: (yes/no)"
)
_LINE = re.compile(r"(?<!\d)(\d+)\s*[:.)][\s(*_\"'“]*(yes|no)\b(?!\s*/)", re.IGNORECASE)


class Coverage(Suite):
    """Captions covered, of five; and the share of pictures whose first caption is covered, which is the paper's v2."""

    name = "coverage"
    title = "ground-truth captions covered (Table 2)"
    data = "COCO captions (JSON and pictures), or rows with `image` and a list of `captions`"
    measures = {
        "covered": Measure(
            "captions covered", "{:.2f}", True, f"Captions of a picture that are covered, of {CAPTIONS}."
        ),
        "first_covered": Measure("first caption covered", "{:.1%}", True, "Pictures whose first caption is covered."),
    }
    needs_judge = True

    def questions(self, row: Row) -> list[Question]:
        facts = {"captions": captions_of(row), **({"things": row["things"]} if row.get("things") else {})}
        return [Question(row["image"], PROMPT, Sampling(256), facts=facts)]

    def joined(self, one: Question, other: Question) -> Question:
        return with_captions_of_both(one, other)

    def case(self, reply: Reply) -> Case:
        captions = captions_asked(reply)
        listed = " ".join(f"{number}: {text}" for number, text in enumerate(captions, 1))
        questions = tuple(f"Does the reply say what this caption says? “{caption}”" for caption in captions)
        return Case(reply, f"{REQUEST}\n\nTest: {reply.text or '(nothing)'} {listed}", questions)

    def read_verdict(self, reply: Reply, answer: str) -> Verdict:
        captions, told = captions_asked(reply), _LINE.findall(answer)
        if len(captions) == 1 and not told:
            return (yes_or_no(answer),)
        said = [{word.lower() for number, word in told if int(number) == place + 1} for place in range(len(captions))]
        return tuple(words == {"yes"} if len(words) == 1 else None for words in said)

    def own_verdict(self, reply: Reply) -> Verdict | None:
        """What is true in the embedded world: whether a thing is told with its colour, shape and place."""
        things = reply.facts.get("things")
        return told_things(reply.text, things)[:CAPTIONS] if things else None

    def parts(
        self, replies: Sequence[Reply], verdicts: Sequence[Verdict | None]
    ) -> Mapping[str, Sequence[Part | None]]:
        read = [
            None if verdict is None or None in verdict else [bool(said) for said in verdict] for verdict in verdicts
        ]
        return {
            "covered": [None if said is None else Part(CAPTIONS * sum(said) / len(said)) for said in read],
            "first_covered": [None if said is None else Part(said[0]) for said in read],
        }


def captions_asked(reply: Reply) -> list[str]:
    """The captions of a picture that count: the first five."""
    return list(reply.facts["captions"][:CAPTIONS])
