"""Table 1: four abilities that captions do not teach, on pictures of one's own."""

from collections.abc import Mapping, Sequence

from recipes_minigpt4.evaluation.questions import Question, Sampling
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.statistics import Measure, Part
from recipes_minigpt4.evaluation.suite import Case, Row, Suite, Verdict, WrongRowError
from recipes_minigpt4.evaluation.suites.captions import captions_of
from recipes_minigpt4.evaluation.words import yes_or_no


PROMPTS = {  # kind → the words (paper, section 4.2)
    "meme": "Explain why this meme is funny.",
    "recipe": "How should I make something like this?",
    "ad": "Help me draft a professional advertisement for this.",
    "poem": "Can you craft a beautiful poem about this image?",
}
KINDS = {
    "memes": "meme",
    "recipes": "recipe",
    "ads": "ad",
    "advertisement": "ad",
    "advertisements": "ad",
    "poems": "poem",
}
REQUEST = (
    "A model was shown a picture, which you cannot see, and replied to the prompt below. Does the reply do what the "
    "prompt asks for, about this picture? Answer yes or no."
)


class Abilities(Suite):
    """Requests that are addressed, of each kind and of all, as people or a judge say."""

    name = "abilities"
    title = "requests addressed (Table 1)"
    data = "a folder with pictures in the folders meme, recipe, ad and poem, or rows with `image` and `kind`"
    measures = {
        **{
            kind: Measure(f"{kind} addressed", "{:.1%}", True, f"Replies to {prompt!r} that do what is asked.")
            for kind, prompt in PROMPTS.items()
        },
        "total": Measure("all addressed", "{:.1%}", True, "Replies that do what is asked, of all kinds."),
    }
    needs_judge = True

    def questions(self, row: Row) -> list[Question]:
        kind = str(row.get("kind", "")).lower()
        kind = KINDS.get(kind, kind)
        if kind not in PROMPTS:
            raise WrongRowError(f"no `kind` of {', '.join(PROMPTS)}")
        try:
            about = captions_of(row)
        except WrongRowError:
            about = []
        return [Question(row["image"], PROMPTS[kind], Sampling(512), facts={"kind": kind, "captions": about})]

    def case(self, reply: Reply) -> Case:
        about = " ".join(reply.facts["captions"]) or "(not described)"
        request = f"{REQUEST}\n\nPicture: {about}\nPrompt: {reply.prompt}\nReply: {reply.text or '(nothing)'}"
        return Case(reply, request, (f"Does the reply do what is asked, about this picture? “{reply.prompt}”",))

    def read_verdict(self, reply: Reply, answer: str) -> Verdict:
        return (yes_or_no(answer),)

    def parts(
        self, replies: Sequence[Reply], verdicts: Sequence[Verdict | None]
    ) -> Mapping[str, Sequence[Part | None]]:
        total = [None if verdict is None or verdict[0] is None else Part(float(verdict[0])) for verdict in verdicts]
        kinds = [reply.facts["kind"] for reply in replies]
        return {
            **{
                wanted: [part if kind == wanted else None for part, kind in zip(total, kinds, strict=True)]
                for wanted in PROMPTS
            },
            "total": total,
        }
