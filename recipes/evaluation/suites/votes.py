"""What people prefer who compare models on a page; see `minigpt4 app`."""

from collections.abc import Mapping, Sequence

from recipes_minigpt4.evaluation.questions import Question
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.statistics import Measure, Part
from recipes_minigpt4.evaluation.suite import Row, Suite, Verdict, WrongRowError


BEST, TIE, ALL_BAD = "best", "tie", "bad"  # `vote` in a reply's facts; anything else: another one was the best


class Votes(Suite):
    """Shares of the votes in which a model was the best, or as good as the best. Replies come with their votes."""

    name = "votes"
    title = "votes of people who saw several replies"
    data = "what people voted on the page of `minigpt4 app`, whose folder --from_replies reads"
    measures = {
        "best": Measure("best", "{:.1%}", True, "Votes for this model's reply, or for one that is the same."),
        "not_worse": Measure("best or tie", "{:.1%}", True, "Votes for this model's reply, and those for a tie."),
        "bad": Measure("all bad", "{:.1%}", False, "Votes that say that all replies are bad."),
    }

    def questions(self, row: Row) -> list[Question]:
        raise WrongRowError("no votes, for models asked anew have none; compare them on the page")

    def parts(
        self, replies: Sequence[Reply], verdicts: Sequence[Verdict | None]
    ) -> Mapping[str, Sequence[Part | None]]:
        votes = [reply.facts["vote"] for reply in replies]
        return {
            "best": [Part(vote == BEST) for vote in votes],
            "not_worse": [Part(vote in (BEST, TIE)) for vote in votes],
            "bad": [Part(vote == ALL_BAD) for vote in votes],
        }
