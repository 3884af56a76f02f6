"""Publishing: which files go to the Hub, how they get there in one commit, and what to do when that fails.

Used by `minigpt4 push`, by `minigpt4 convert --push_to_hub` and by the trainer. What huggingface_hub retries itself –
large files, the questions about them – is left to it; the rest, the commit above all, is tried again here.
"""

import inspect
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import http_backoff

from modeling_minigpt4.convert_minigpt4_to_hf import VISION_FOLDER
from modeling_minigpt4.peft_minigpt4 import ADAPTER_FOLDER
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.redaction import holds_secret


logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# What decides how a repository loads. An older file of these is no longer there after a push that does not have it.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
OPTIONAL = ("generation_config.json", "chat_template*", "additional_chat_templates/*")
# Everything that is published; logs, checkpoints, the optimizer and the settings of a run are not among it.
PUBLISHED = (
    *WEIGHTS, *OPTIONAL, "config.json", "processor_config.json", "preprocessor_config.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.py", "README.md", "LICENSE*",
    "NOTICE*", "panel.html",
)  # fmt: skip
TEXTS = {".json", ".jsonl", ".jinja", ".md", ".html", ".py", ".txt"}

PAUSES = (2.0, 8.0, 20.0)  # seconds before another attempt
# Conflicts (409; 412 if a commit came in between), and what the Hub and the proxies before it say when overloaded.
PASSING = {408, 409, 412, 425, 429}


# ---- which files ----------------------------------------------------------------------------------------------------


def published_files(folder: "str | os.PathLike[str]", subfolders: Collection[str] = ()) -> dict[str, Path]:
    """
    The files of a saved folder that are published: path in the repository → path here.

    Args:
        folder: what `save_pretrained` or the trainer wrote.
        subfolders: folders in it that hold backbones, beside the usual ones.
    """
    inside = {ADAPTER_FOLDER, VISION_FOLDER, *subfolders}
    patterns = (
        *PUBLISHED,
        *(f"{name}/{pattern}" for name in inside for pattern in (*PUBLISHED, "adapter_config.json")),
    )
    root = Path(folder)
    found = (path for depth in ("*", "*/*", "*/*/*") for path in root.glob(depth) if path.is_file())
    named = {path.relative_to(root).as_posix(): path for path in found}
    return {name: named[name] for name in sorted(named) if _matches(name, patterns)}


def _matches(name: str, patterns: Collection[str]) -> bool:
    depth = name.count("/")
    return any(pattern.count("/") == depth and PurePosixPath(name).match(pattern) for pattern in patterns)


def check_secrets(files: Mapping[str, Path]) -> None:
    """
    Refuse to publish a text with a token or a password in it.

    Raises:
        RecipeError: that names the file.
    """
    for name, path in files.items():
        if path.suffix in TEXTS and holds_secret(path.read_text(encoding="utf-8", errors="replace")):
            raise RecipeError(f"{name} holds a token or a password; take it out of {path} before it is published.")


# ---- getting them there ---------------------------------------------------------------------------------------------


def make_repository(
    repo_id: str, private: bool | None = None, token: str | None = None, kind: str = "model"
) -> RepoUrl:
    """
    Make a repository of a `kind`, "model", "dataset" or "space" (of Gradio), or find the one that is there.

    Raises:
        RecipeError: if it was to be private and is not.
    """
    api = HfApi(token=token)
    sdk = "gradio" if kind == "space" else None
    repo = patiently(partial(api.create_repo, repo_id, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk))
    check_private(repo.repo_id, private, token, kind)
    return repo


def check_private(repo_id: str, private: bool | None, token: str | None, kind: str = "model") -> None:
    """Refuse to publish to everybody what was to be private: a repository that is there keeps its visibility."""
    if private and not patiently(partial(HfApi(token=token).repo_info, repo_id, repo_type=kind)).private:
        raise RecipeError(
            f"{repo_id} is there already and public; make it private in its settings on the Hub, or push to another."
        )


def upload(
    repo_id: str,
    files: Mapping[str, Path],
    message: str,
    revision: str | None = None,
    token: str | None = None,
    kind: str = "model",
    stale: Collection[str] = (*WEIGHTS, *OPTIONAL),
) -> Any:
    """
    Send files in one commit, which is there as a whole or not at all.

    Args:
        repo_id: repository, which has to be there.
        files: path in the repository → path here.
        message: of the commit.
        revision: branch; made from `main` if there is none.
        token: of the Hub; that of the login if left out.
        kind: of the repository, "model", "dataset" or "space".
        stale: patterns of files that go if they are not among `files`; of a model its weights and templates.

    Returns:
        huggingface_hub's `CommitInfo`.

    Raises:
        RecipeError: if a file holds a secret.
        Exception: what huggingface_hub raises, after several attempts if that may help; see `explain`.
    """
    check_secrets(files)
    api = HfApi(token=token)

    def attempt() -> Any:
        try:
            there = api.repo_info(repo_id, revision=revision, repo_type=kind)
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=kind)
            there = api.repo_info(repo_id, revision=revision, repo_type=kind)
        old = [file.rfilename for file in there.siblings if _matches(file.rfilename, stale)]
        operations = [
            *(CommitOperationDelete(path_in_repo=name) for name in old if name not in files),
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()),
        ]
        return api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, parent_commit=there.sha, repo_type=kind
        )

    return patiently(attempt)


def patiently(action: Callable[[], Result]) -> Result:
    """Do something on the Hub; after errors that pass, try again a few times with a growing pause."""
    for pause in PAUSES:
        try:
            return action()
        except Exception as error:
            if not passes(error):
                raise
            logger.warning("%s; trying again in %g seconds.", explain(error), pause)
        time.sleep(pause)
    return action()


# ---- errors ---------------------------------------------------------------------------------------------------------


def passes(error: BaseException) -> bool:
    """Whether an error may be over in a while: a conflict, trouble of the Hub, or a connection that broke."""
    if status := status_of(error):
        return status in PASSING or status >= 500
    # What huggingface_hub itself tries again where it does, and what Xet's client raises.
    lost = (*inspect.signature(http_backoff).parameters["retry_on_exceptions"].default, ConnectionError, TimeoutError)
    return any(isinstance(one, lost) and not isinstance(one, OfflineModeIsEnabled) for one in chain_of(error))


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, if there is one."""
    for one in chain_of(error):
        if (status := getattr(getattr(one, "response", None), "status_code", None)) is not None:
            return int(status)
    return None


def chain_of(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised from."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def explain(error: BaseException) -> str:
    """What went wrong on the Hub and what helps, without a full stop."""
    if isinstance(error, RecipeError):
        return one_line(error)
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain_of(error)):
        return "HF_HUB_OFFLINE is set; unset it"
    root, status = chain_of(error)[-1], status_of(error)
    if status == 401:
        return "the Hub does not know you (401); log in with `hf auth login`, or set HF_TOKEN to a valid token"
    if status == 403:
        return "your token may not write there (403); use one with write permission, and a name of your own"
    if status == 404:
        return "there is no such repository or branch, or none that your token may see (404)"
    if status in (409, 412):
        return f"somebody else was changing the repository at the same time ({status})"
    if status == 429 or (status or 0) >= 500:
        return f"the Hub is overloaded or out of order ({status})"
    if status is not None:
        told = [message for one in chain_of(error) if (message := getattr(one, "server_message", None))]
        return f"the Hub refused ({status}: {one_line(ValueError(told[0]) if told else error)})"
    return f"the connection to the Hub broke ({one_line(root)})" if passes(error) else one_line(root)


def could_not_push(
    error: BaseException, folder: object, repo_id: str, private: bool | None, revision: str | None
) -> str:
    """One sentence for a push that failed: why, that nothing is lost, and how to go on."""
    options = " --private" * bool(private) + (f" --revision {revision}" if revision else "")
    again = f"minigpt4 push {folder} {repo_id}{options}"
    return f"{folder} is whole but not on the Hub: {explain(error)}; then go on with `{again}`."
