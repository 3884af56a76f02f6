"""The models that lmms-eval runs as `--model minigpt4`: any folder or repository of ours."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4.evaluation.harness.chats import Chat, chat_about, generation_options, losses, reply


class MiniGPT4(lmms):
    """
    A model for tasks that give a text and pictures, and for those that ask how likely replies are.

    Args:
        pretrained: folder or repository of a checkpoint, adapter-only or whole.
        device: where it runs; by default a GPU if there is one, each process on its own.
        dtype: of the weights; by default the checkpoint's.
        batch_size: chats at a time.
        revision: of the repository.
        trust_remote_code: whether backbones may bring code of their own.

    Raises:
        ValueError: for other arguments, and for a batch size that is no number.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size: int | str | None = None,  # which lmms-eval passes to every model
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"--model_args of minigpt4 has no {', '.join(unknown)}; leave it out.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"The batch size is {batch_size!r}; give a whole number from 1 on.")
        self.batch_size = int(batch_size)
        self.device = torch.device(device or PartialState().device)
        where: dict[str, Any] = {
            "trust_remote_code": trust_remote_code,
            **({"revision": revision} if revision else {}),
        }
        self.model = MiniGPT4ForConditionalGeneration.from_pretrained(pretrained, dtype=dtype, **where)
        self.model.to(self.device).eval()
        self.processor = MiniGPT4Processor.from_pretrained(pretrained, **where)
        self.processor.tokenizer.padding_side = "left"  # as generation needs it; training saves the other

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A reply to every request; those with the same options share batches."""
        replies = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(self._options_of(request), sort_keys=True, default=str), []).append(number)
        for numbers in groups.values():
            options = generation_options(self._options_of(requests[numbers[0]]))
            for batch in self._batches(numbers):
                chats = [self._chat_of(requests[number]) for number in batch]
                for number, text in zip(batch, reply(self.model, self.processor, chats, options), strict=True):
                    replies[number] = text
                    asked = (requests[number].args[0], self._options_of(requests[number]))
                    self.cache_hook.add_partial("generate_until", asked, text)
        return replies

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The mean loss of every reply that is asked for, the lower the likelier, and whether it is the likeliest."""
        found: list[tuple[float, bool]] = []
        for batch in self._batches(range(len(requests))):
            chats, replies = [], []
            for number in batch:
                text, wanted, visuals, row, task, split = requests[number].args
                doc = self.task_dict[task][split][row]
                chats.append(chat_about(visuals(doc) or [], text))
                replies.append(wanted if isinstance(wanted, str) else wanted(doc))
            found += losses(self.model, self.processor, chats, replies)
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("The model minigpt4 of lmms-eval answers tasks of one round; choose such a task.")

    def _options_of(self, request: Instance) -> dict[str, Any]:
        return dict(request.args[1])

    def _chat_of(self, request: Instance) -> Chat:
        text, _, visuals, row, task, split = request.args
        return chat_about(visuals(self.task_dict[task][split][row]) or [], text)

    def _batches(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        starts = range(0, len(numbers), self.batch_size)
        for start in tqdm(starts, desc="Replies", disable=self.rank != 0):
            yield numbers[start : start + self.batch_size]


class MiniGPT4Chat(MiniGPT4):
    """A model for tasks that give whole chats, with pictures where they stand in them."""

    is_simple = False

    def _options_of(self, request: Instance) -> dict[str, Any]:
        return dict(request.args[2])

    def _chat_of(self, request: Instance) -> Chat:
        _, messages, _, row, task, split = request.args
        chat: Chat = ChatMessages(messages=messages(self.task_dict[task][split][row])).to_hf_messages()
        return chat
