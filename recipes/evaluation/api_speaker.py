"""A model behind a server that speaks OpenAI's language: `openai:URL#MODEL`."""

import base64
import io
from collections.abc import Sequence

import PIL.Image

from recipes_minigpt4.evaluation.questions import Question
from recipes_minigpt4.evaluation.replies import Said
from recipes_minigpt4.llm.client import Answer, ClientOptions, Request, open_client
from recipes_minigpt4.utils.errors import RecipeError


class ApiSpeaker:
    """
    Sends pictures and prompts to a server, several at once. Nobody tells the likelihood of choices there.

    Args:
        name: `openai:URL#MODEL`, or `openai:MODEL` for OpenAI itself.
        concurrency: requests under way at a time.

    Raises:
        RecipeError: see `open_client`.
    """

    def __init__(self, name: str, concurrency: int) -> None:
        self.client = open_client(name, ClientOptions(concurrency=concurrency, prefix="model_"))
        self.revision = self.client.name

    def answer(self, questions: Sequence[Question], pictures: Sequence[PIL.Image.Image]) -> list[Said]:
        """
        The answers, in order.

        Raises:
            RecipeError: for a server that does not answer one of them after all attempts.
        """
        requests = [_request(question, picture) for question, picture in zip(questions, pictures, strict=True)]
        told: dict[int, Said] = {}
        for place, answer in self.client.ask(requests):
            if not isinstance(answer, Answer):
                raise RecipeError(
                    f"{self.revision} gave no answer about {questions[place].picture.name} ({answer.reason}); run the "
                    "command again when it does, which goes on where it was."
                )
            finished = None if answer.finish_reason is None else answer.finish_reason != "length"
            told[place] = Said(answer.text.strip(), finished)
        return [told[place] for place in range(len(requests))]


def _request(question: Question, picture: PIL.Image.Image) -> Request:
    file = io.BytesIO()
    picture.save(file, "PNG")
    address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": question.prompt}]
    return Request(
        ({"role": "user", "content": content},),
        temperature=question.sampling.temperature,
        max_tokens=question.sampling.max_new_tokens,
        seed=int(question.key[:7], 16),
    )
