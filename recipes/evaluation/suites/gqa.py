"""Tables 5 and 7: GQA, questions about what a picture shows (Hudson and Manning, 2019)."""

from collections.abc import Mapping, Sequence

from recipes_minigpt4.evaluation.questions import Question, Sampling
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.short_answers import ASKED, MAX_TOKENS, normalized
from recipes_minigpt4.evaluation.statistics import Measure, Part
from recipes_minigpt4.evaluation.suite import Row, Suite, Verdict, WrongRowError
from recipes_minigpt4.evaluation.words import words_of


class Gqa(Suite):
    """Accuracy by exact match after the normalisation of the VQA evaluation, which BLIP-2's release uses here too."""

    name = "gqa"
    title = "GQA (Tables 5, 7)"
    data = "testdev_balanced_questions.json and GQA's pictures, or rows with `image`, `question` and `answer`"
    measures = {
        "accuracy": Measure("accuracy", "{:.1%}", True, "Replies that are the answer, word by word."),
        "named": Measure(
            "answer named", "{:.1%}", True, "Replies that have the answer somewhere; no published number."
        ),
        "words": Measure("mean words", "{:.1f}", None, "Words of a reply; no long one can match."),
    }

    def questions(self, row: Row) -> list[Question]:
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str):
            raise WrongRowError("no `question`")
        if not isinstance(answer, str):
            raise WrongRowError("no `answer`")
        return [Question(row["image"], ASKED.format(question), Sampling(MAX_TOKENS), facts={"answer": answer})]

    def parts(
        self, replies: Sequence[Reply], verdicts: Sequence[Verdict | None]
    ) -> Mapping[str, Sequence[Part | None]]:
        pairs = [(normalized(reply.text), normalized(reply.facts["answer"])) for reply in replies]
        return {
            "accuracy": [Part(said == answer) for said, answer in pairs],
            "named": [Part(f" {answer} " in f" {said} ") for said, answer in pairs],
            "words": [Part(len(words_of(reply.text))) for reply in replies],
        }
