"""Pushes of a trainer: while it trains, in the background, and at the end."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer import TRAINING_ARGS_NAME  # a pickle, which nobody needs to resume
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from recipes_minigpt4.hub.publish import check_private, could_not_push, explain, patiently, published_files, upload
from recipes_minigpt4.utils.errors import RecipeError


logger = logging.getLogger(__name__)

DRAFT = "_push-"  # begins the name of a folder with links to what is on its way


class PublishingMixin:
    """
    Pushes of a Trainer: what loads and nothing else, each in one commit, and none of them able to end a run.

    While training, a checkpoint is pushed in the background, from links to its files, which stay what they are
    whatever happens to the folder. If that fails, it is told in a line, and the next one brings everything.
    """

    # What the Trainer brings.
    args: Any
    state: Any
    hub_model_id: str | None
    push_in_progress: Any
    callback_handler: Any
    control: Any
    is_world_process_zero: Callable[[], bool]
    save_model: Callable[..., None]
    create_model_card: Callable[..., None]
    _finish_current_push: Callable[[], None]

    _uploads: HfApi | None = None  # whose background jobs run one after the other
    _told_of_failure = False

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """
        Make the repository; see [`~transformers.Trainer.init_hf_repo`].

        Raises:
            RecipeError: if that cannot be done, before anything is trained.
        """
        make = super().init_hf_repo  # type: ignore[misc]
        if self.is_world_process_zero():
            for left in Path(self.args.output_dir).glob(f"{DRAFT}*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        try:
            patiently(partial(make, *args, **kwargs))
            if self.hub_model_id is not None and self.is_world_process_zero():
                check_private(
                    self.hub_model_id, self.args.hub_private_repo, kwargs.get("token") or self.args.hub_token
                )
        except Exception as error:
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            raise RecipeError(
                f"{name} cannot be pushed to: {explain(error)}; or train without --push_to_hub, and use "
                "`minigpt4 push` later."
            ) from error

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save the model and push it with processor, code and card; see [`~transformers.Trainer.push_to_hub`].

        Raises:
            RecipeError: if it cannot be pushed. All of it is saved then.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, **{name: kwargs[name] for name in ("private",) if name in kwargs})
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.pop("private", None)
        self.create_model_card(**kwargs)
        self._on_push_begin()
        self._finish_current_push()
        folder, repo_id, revision = self.args.output_dir, str(self.hub_model_id), revision or self.args.hub_revision
        send = partial(
            upload, repo_id, published_files(folder), commit_message, revision, token or self.args.hub_token
        )
        if not blocking:
            return self._background().run_as_future(send)
        try:
            return send()
        except Exception as error:
            raise RecipeError(could_not_push(error, folder, repo_id, self.args.hub_private_repo, revision)) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        if running is not None and not running.is_done() and not self.args.hub_always_push:
            return
        message = f"Training in progress, step {self.state.global_step}"
        try:
            self._on_push_begin()
            draft, files = self._link_files(checkpoint_folder, strategy)
        except Exception as error:  # a full disk, or a callback's own trouble with the network
            self._tell_failure(message, error)
            return
        job = self._background().run_as_future(self._push_in_background, draft, files, message)
        if running is None or running.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            running.jobs.append(job)

    def _link_files(self, checkpoint_folder: str, strategy: HubStrategy) -> tuple[Any, dict[str, Path]]:
        """A folder of links to what is pushed of a checkpoint, and its files: path in the repository → path here."""
        files = published_files(checkpoint_folder)
        if (panel := Path(self.args.output_dir, "panel.html")).is_file():
            files[panel.name] = panel
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            step = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else step
            files |= {f"{name}/{path}": file for path, file in _all_files(checkpoint_folder).items()}
        draft = tempfile.TemporaryDirectory(prefix=DRAFT, dir=self.args.output_dir)
        return draft, {name: _link(path, Path(draft.name, name)) for name, path in files.items()}

    def _push_in_background(self, draft: Any, files: Mapping[str, Path], message: str) -> None:
        with draft:
            try:
                upload(str(self.hub_model_id), files, message, self.args.hub_revision, self.args.hub_token)
                self._told_of_failure = False
            except Exception as error:
                self._tell_failure(message, error)

    def _tell_failure(self, message: str, error: Exception) -> None:
        """Say it in a line, and not again before a push has worked."""
        if not self._told_of_failure:
            step, why = message.rpartition(", ")[2], explain(error)
            logger.warning(
                "%s is not on the Hub: %s. Training goes on; the next checkpoint is pushed again.", step, why
            )
        self._told_of_failure = True

    def _background(self) -> HfApi:
        if self._uploads is None:
            self._uploads = HfApi()
        return self._uploads

    def _on_push_begin(self) -> None:
        if hasattr(self.callback_handler, "on_push_begin"):  # not in 4.57
            self.callback_handler.on_push_begin(self.args, self.state, self.control)


def _all_files(folder: "str | os.PathLike[str]") -> dict[str, Path]:
    """Every file of a checkpoint but the settings of the run: what resuming takes."""
    root = Path(folder)
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != TRAINING_ARGS_NAME)
    return {path.relative_to(root).as_posix(): path for path in files}


def _link(source: Path, target: Path) -> Path:
    """Another name for a file, or a copy where the file system knows no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.name == "panel.html":  # written anew while it is sent
        shutil.copyfile(source, target)
        return target
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
