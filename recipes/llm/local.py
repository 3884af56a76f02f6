"""A chat model of transformers that answers on this machine, in batches: greedily, or with a seed per request."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from recipes_minigpt4.llm.cache import AnswerCache, Reply, ask_what_is_new
from recipes_minigpt4.llm.exchange import Answer, Failure, Request, pictures_of, text_of
from recipes_minigpt4.llm.options import ClientOptions
from recipes_minigpt4.utils.errors import RecipeError, one_line


@dataclass
class Prompt:
    """A request as the model reads it."""

    number: int
    request: Request
    ids: list[int]


class LocalClient:
    """
    A `Client` on this machine. Answers do not depend on the size of the batch.

    Args:
        where: a folder, or a repository of the Hub with `@REVISION` if wanted.

    Raises:
        RecipeError: if that is no causal language model with a chat template, or needs code of its own.
    """

    def __init__(self, where: str, options: ClientOptions) -> None:
        self.options = options
        folder = Path(where).expanduser()
        if not folder.is_dir() and where.startswith(("/", ".", "~")):
            raise RecipeError(f"local:{where}: there is no such folder; name a folder or repository of a chat model.")
        repository, _, revision = (str(folder), "", "") if folder.is_dir() else where.partition("@")
        chosen: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(repository, **chosen)
            self.model = AutoModelForCausalLM.from_pretrained(repository, dtype=options.dtype, **chosen)
            self.model = self.model.to(device).eval()
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"local:{where} cannot be loaded as a language model ({one_line(error).split('. ')[0][:200]}); name a "
                "folder or repository of a chat model."
            ) from error
        if not getattr(self.tokenizer, "chat_template", None):
            raise RecipeError(f"local:{where} has no chat template; name a model that was trained to chat.")
        if folder.is_dir():
            self.name = f"local:{folder.resolve().name}@{fingerprint(folder)}"
        else:
            commit = getattr(self.model.config, "_commit_hash", None) or revision
            self.name = f"local:{repository}" + (f"@{commit}" if commit else "")
        self.name += f" in {str(self.model.dtype).removeprefix('torch.')}"
        self.cache = AnswerCache(options.cache, self.name, options.flag("cache"))
        self._prepare_generation()

    def _prepare_generation(self) -> None:
        """Leave no sampling of the model's own: a request says all there is to say."""
        own, tokenizer = self.model.generation_config, self.tokenizer
        ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        pads = (tokenizer.pad_token_id, own.pad_token_id, *sorted(self._ends), 0)
        self._pad = next(pad for pad in pads if pad is not None)
        self.model.generation_config = GenerationConfig(
            eos_token_id=sorted(self._ends) or None, pad_token_id=self._pad, bos_token_id=tokenizer.bos_token_id
        )
        self._longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | Failure]]:
        return ask_what_is_new(self.cache, requests, self._ask_new)

    def _ask_new(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | Failure]]:
        prompts = []
        for number, request in enumerate(requests):
            ids = self._read(request)
            if self._longest and len(ids) + request.max_tokens > self._longest:
                yield (
                    number,
                    Failure(
                        f"its {len(ids)} tokens and an answer of {request.max_tokens} do not fit the model's "
                        f"{self._longest} positions"
                    ),
                )
            else:
                prompts.append(Prompt(number, request, ids))
        prompts.sort(key=lambda prompt: len(prompt.ids), reverse=True)  # like lengths, and the most memory first
        size = self.options.batch_size
        while prompts:
            batch, rest = prompts[:size], prompts[size:]
            try:
                replies = self._generate(batch)
            except torch.cuda.OutOfMemoryError:
                if (size := len(batch) // 2) == 0:
                    raise RecipeError(f"{self.name} does not fit the memory; name a smaller model.") from None
                torch.cuda.empty_cache()
                continue
            for prompt, reply in zip(batch, replies, strict=True):
                yield prompt.number, self._keep(prompt.request, reply)
            prompts = rest

    def _keep(self, request: Request, reply: Reply) -> Answer | Failure:
        if not reply.text.strip():
            return Failure("the answer is empty")
        return self.cache.keep(request.key(self.name), reply, 0.0, 1)

    def _read(self, request: Request) -> list[int]:
        """The chat as ids, up to where the model answers."""
        if pictures_of(request):
            raise RecipeError(f"{self.name} is asked about pictures; a local model reads text only.")
        chat = [{**message, "content": text_of(message.get("content"))} for message in request.messages]
        try:
            # Where a template knows the word, the model answers without thinking aloud.
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # a template raises what it likes
            raise RecipeError(
                f"The chat template of {self.name} refuses the messages ({one_line(error)}); name another model."
            ) from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Prompt]) -> list[Reply]:
        """Answer a batch, padded on the left."""
        width = max(len(prompt.ids) for prompt in batch)
        gaps = [width - len(prompt.ids) for prompt in batch]
        ids = [[self._pad] * gap + prompt.ids for gap, prompt in zip(gaps, batch, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
        sampling = SeededSampling([prompt.request for prompt in batch])
        generated = self.model.generate(
            input_ids=torch.tensor(ids, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            max_new_tokens=max(prompt.request.max_tokens for prompt in batch),
            do_sample=False,
            logits_processor=LogitsProcessorList([sampling] if sampling else []),
        )
        rows = generated[:, width:].tolist()
        return [self._reply(prompt, row) for prompt, row in zip(batch, rows, strict=True)]

    def _reply(self, prompt: Prompt, row: list[int]) -> Reply:
        row = row[: prompt.request.max_tokens]
        end = next((place for place, token in enumerate(row) if token in self._ends), None)
        said = row if end is None else row[:end]
        text = self.tokenizer.decode(said, skip_special_tokens=True)
        finish = "length" if end is None else "stop"
        return Reply(text.strip(), len(prompt.ids), len(said), finish_reason=finish, raw=text)


class SeededSampling(LogitsProcessor):
    """
    Makes the likeliest token of every row one that is drawn at its temperature, by numbers of its own.

    The likeliest of logits / temperature with Gumbel noise is distributed as a token that is drawn from their softmax.
    So a batch is generated greedily, and no row hangs on the others. At temperature 0 a row stays as it is.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._rows = {
            row: (request.temperature, torch.Generator().manual_seed(seed_of(request)))
            for row, request in enumerate(requests)
            if request.temperature > 0
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float().clone()  # (batch, vocabulary)
        for row, (temperature, generator) in self._rows.items():
            noise = -torch.empty(scores.shape[-1]).exponential_(generator=generator).log()
            scores[row] = scores[row] / temperature + noise.to(scores.device)
        return scores


def seed_of(request: Request) -> int:
    """The seed of a request's sampling: another one for another request."""
    return int(request.key("sampling")[:15], 16)


def fingerprint(folder: Path) -> str:
    """What tells one model in a folder from another: texts by their content, weights by size and time of change."""
    marks: list[Any] = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt", ".model"):
            marks.append((path.name, sha256(path.read_bytes()).hexdigest()))
        elif path.is_file() and path.suffix in (".safetensors", ".bin"):
            marks.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return sha256(json.dumps(marks).encode()).hexdigest()[:12]
