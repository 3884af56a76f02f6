"""The one client of whoever mends or judges.

    client = open_client("openai:gpt-4o-mini", ClientOptions(cache=Path("answers"), max_cost=5.0, ...))
    for number, answer in client.ask(requests):
        ...

Answers come in the order in which they end. With a cache, nothing that was answered is asked again.
"""

from recipes_minigpt4.llm.exchange import Answer, BudgetError, Client, Failure, Request
from recipes_minigpt4.llm.options import ClientOptions, add_client_options, client_options
from recipes_minigpt4.utils.errors import RecipeError


__all__ = [
    "Answer",
    "BudgetError",
    "Client",
    "ClientOptions",
    "Failure",
    "Request",
    "add_client_options",
    "client_options",
    "open_client",
]


def open_client(spec: str, options: ClientOptions | None = None) -> Client:
    """
    Open the client that a person names.

    Args:
        spec: `local:FOLDER_OR_REPO[@REVISION]`, a chat model of transformers; `openai:MODEL` or `openai:URL#MODEL`, a
            server that speaks OpenAI's language; `stub:FILE`, scripted answers.
        options: how it works.

    Raises:
        RecipeError: if there is no such thing; whether a server is there, the first request tells.
    """
    options = options or ClientOptions()
    kind, _, what = spec.partition(":")
    if not what or kind not in ("local", "openai", "stub"):
        raise RecipeError(
            f"{spec!r} names nobody who could answer; write local:FOLDER_OR_REPO, openai:MODEL or stub:FILE."
        )
    if kind == "stub":
        from recipes_minigpt4.llm.stub import open_stub

        return open_stub(what, options)
    if kind == "openai":
        from recipes_minigpt4.llm.openai_client import OpenAISender
        from recipes_minigpt4.llm.sending import SendingClient

        return SendingClient(OpenAISender(what, options), options)
    from recipes_minigpt4.llm.local import LocalClient

    return LocalClient(what, options)
