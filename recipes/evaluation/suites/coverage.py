"""Table 2: how many of the captions that people wrote a description covers, as a judge tells."""

import re
from collections.abc import Mapping, Sequence

from recipes_minigpt4.evaluation.questions import Question, Sampling
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.statistics import Measure, Part
from recipes_minigpt4.evaluation.suite import Case, Row, Suite, Verdict
from recipes_minigpt4.evaluation.suites.captions import captions_of


PROMPT = "Describe the image in detail."
CAPTIONS = 5  # that are asked about, the first of each picture
REQUEST = (  # words of the paper's appendix, with places for what is tested
    "Given a test image description and a list of gt image caption, verify whether the information in gt caption is "
    "included in the test description. The answer should be yes or no. Input is in this format: Test: (test sentence) "
    "1: (gt1) 2: (gt2) 3: (gt3) you need to answer yes or no for each gt in the following format: 1: (yes/no) 2: "
    "(yes/no) 3: (yes/no)"
)
_LINE = re.compile(r"(?<!\d)(\d+)\s*[:.)]\s*\(?\s*(yes|no)\b", re.IGNORECASE)


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
        return [Question(row["image"], PROMPT, Sampling(256), facts={"captions": captions_of(row)[:CAPTIONS]})]

    def case(self, reply: Reply) -> Case:
        captions = reply.facts["captions"]
        listed = " ".join(f"{number}: {text}" for number, text in enumerate(captions, 1))
        questions = tuple(f"Does the reply say what this caption says? “{caption}”" for caption in captions)
        return Case(reply, f"{REQUEST}\n\nTest: {reply.text or '(nothing)'} {listed}", questions)

    def read_verdict(self, reply: Reply, answer: str) -> Verdict:
        told = {int(number): word.lower() == "yes" for number, word in _LINE.findall(answer)}
        return tuple(told.get(number) for number in range(1, len(reply.facts["captions"]) + 1))

    def parts(
        self, replies: Sequence[Reply], verdicts: Sequence[Verdict | None]
    ) -> Mapping[str, Sequence[Part | None]]:
        read = [verdict if verdict and None not in verdict else None for verdict in verdicts]
        return {
            "covered": [verdict and Part(CAPTIONS * sum(map(bool, verdict)) / len(verdict)) for verdict in read],
            "first_covered": [verdict and Part(bool(verdict[0])) for verdict in read],
        }
