"""How well sentences fit a picture: CLIP, SigLIP and their like, BLIP-2's matching head, or a model of our own."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, Blip2ForImageTextRetrieval

from modeling_minigpt4 import MiniGPT4Config
from recipes_minigpt4.curation.likelihood import LikelihoodMatcher
from recipes_minigpt4.evaluation.speakers import ChatSpeaker, SpeakerOptions, revision_of
from recipes_minigpt4.utils.errors import RecipeError, one_line


class Matcher(Protocol):
    """
    Whoever tells how well sentences fit pictures.

    Attributes:
        revision: tells its weights from others.
        most_tokens: of a text; the model would not see what is behind.
    """

    revision: str
    most_tokens: int

    def tokens(self, text: str) -> int:
        """How many tokens a text has."""

    def match(self, pictures: Sequence[PIL.Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """For every picture, how well each of its texts fits: the more, the higher."""


class _Loaded:
    """What both kinds have: model, tokenizer and image processor."""

    def __init__(self, model: Any, tokenizer: Any, images: Any, revision: str, most_tokens: int) -> None:
        self.model, self.tokenizer, self.images, self.revision = model, tokenizer, images, revision
        self.most_tokens = min(most_tokens, tokenizer.model_max_length)

    def tokens(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def _pixels(self, pictures: Sequence[PIL.Image.Image]) -> Any:
        seen = self.images(list(pictures), return_tensors="pt").to(self.model.device)
        return {name: one.to(self.model.dtype) if one.is_floating_point() else one for name, one in seen.items()}

    def _written(self, texts: Sequence[str], **options: Any) -> Any:
        written = self.tokenizer(
            list(texts), return_tensors="pt", truncation=True, max_length=self.most_tokens, **options
        )
        return {name: written[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


class EmbeddingMatcher(_Loaded):
    """
    A model with an encoder for pictures and one for texts, such as CLIP: the cosine of both, -1 to 1.

    SigLIP's texts are filled up to their full length, and its encoder looks at what fills them: so it was trained.
    """

    @torch.inference_mode()
    def match(self, pictures: Sequence[PIL.Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        flat = [text for of_picture in texts for text in of_picture]
        if self.model.config.model_type.startswith("siglip"):
            written = self._written([text.lower() for text in flat], padding="max_length")
            written.pop("attention_mask")
        else:
            written = self._written(flat, padding=True)
        found = self.model(**written, **self._pixels(pictures))
        seen, said = (
            torch.nn.functional.normalize(one.float(), dim=-1) for one in (found.image_embeds, found.text_embeds)
        )
        return [
            (said[start : start + len(of_picture)] @ one).tolist()
            for one, of_picture, start in zip(seen, texts, _starts(texts), strict=True)
        ]


class HeadMatcher(_Loaded):
    """BLIP-2's head for image–text matching: the probability, 0 to 1, that a text belongs to a picture."""

    @torch.inference_mode()
    def match(self, pictures: Sequence[PIL.Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        model = self.model
        encoded = model.vision_model(**self._pixels(pictures)).last_hidden_state  # once per picture
        seen = encoded.to(next(model.qformer.parameters()).dtype).repeat_interleave(
            torch.tensor([len(of_picture) for of_picture in texts], device=encoded.device), 0
        )
        written = self._written([text for of_picture in texts for text in of_picture], padding=True)
        queries = model.query_tokens.expand(len(seen), -1, -1)
        ones = written["attention_mask"].new_ones(queries.shape[:2])
        said = model.qformer(
            query_embeds=model.embeddings(input_ids=written["input_ids"], query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=torch.cat([ones, written["attention_mask"]], 1),
            encoder_hidden_states=seen,
        ).last_hidden_state[:, : queries.shape[1]]
        logits = model.itm_head(said.to(model.itm_head.weight.dtype)).mean(1)  # (texts, 2)
        told = logits.float().softmax(-1)[:, 1].tolist()
        return [told[start : start + len(of)] for of, start in zip(texts, _starts(texts), strict=True)]


def _starts(texts: Sequence[Sequence[str]]) -> list[int]:
    return list(accumulate((len(of_picture) for of_picture in texts), initial=0))[:-1]


def open_matcher(
    name: str, options: SpeakerOptions, others: Callable[[], Sequence[PIL.Image.Image]] = list
) -> Matcher:
    """
    Load a model that tells how well texts fit pictures.

    Args:
        name: folder or repository; `owner/name@revision` for one of its revisions.
        options: see `SpeakerOptions`.
        others: opens a few pictures, for a model that compares.

    Raises:
        RecipeError: if it cannot be loaded, or is no such model.
    """
    is_here = Path(name).expanduser().exists()
    place, _, revision = (str(Path(name).expanduser()), "", "") if is_here else name.partition("@")
    trusted = {"revision": revision or None, "trust_remote_code": options.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(place, **trusted)
        if config.model_type == MiniGPT4Config.model_type:
            return LikelihoodMatcher(ChatSpeaker.load(name, options), others())
        is_blip = config.model_type == "blip-2"
        kind: Any = Blip2ForImageTextRetrieval if is_blip else AutoModel
        told = {} if is_blip else trusted
        model, loaded = kind.from_pretrained(
            place, dtype=options.dtype, output_loading_info=True, **(told or {"revision": revision or None})
        )
        tokenizer = AutoTokenizer.from_pretrained(place, **trusted)
        images = AutoImageProcessor.from_pretrained(place, **trusted)
    except Exception as error:  # transformers and the Hub say in many ways that something is not there
        raise RecipeError(f"--match {name} cannot be loaded ({one_line(error)}).") from error
    if loaded["missing_keys"] or not (is_blip or hasattr(model, "get_text_features")):
        lacks = f"lacks {sorted(loaded['missing_keys'])[0]}" if loaded["missing_keys"] else f"is a {config.model_type}"
        raise RecipeError(
            f"--match {name} {lacks}, so it does not tell how well a text fits a picture; name a CLIP, a SigLIP, or a "
            "BLIP-2 with its matching head, such as Salesforce/blip2-itm-vit-g, or a model of stage 1."
        )
    text_config = config.qformer_config if is_blip else config.text_config
    model = model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    loaded_as = HeadMatcher if is_blip else EmbeddingMatcher
    most = text_config.max_position_embeddings
    return loaded_as(model, tokenizer, images, revision_of(name, model.config), most)
