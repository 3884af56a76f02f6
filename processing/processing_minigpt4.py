"""Processor of MiniGPT-4: text with `<image>` and pictures, or whole chats, to the inputs of the model."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .batch_minigpt4 import MiniGPT4Batch
from .chat_templates_minigpt4 import (
    available_chat_templates,
    knows_parts,
    load_chat_template,
    reply_opening_of,
    separator_of,
    wrap_chat_template,
)
from .conversations_minigpt4 import SEGMENT_MARK, normalize_conversations, place_images, protect_text
from .image_opening_minigpt4 import Color
from .image_processing_minigpt4 import MiniGPT4ImageProcessor, flatten_images
from .placeholder_minigpt4 import PlaceholderMixin
from .processing_compat_minigpt4 import IS_TRANSFORMERS_4, RENDERING
from .replies_minigpt4 import close_replies_once, cut_behind_prompt, cut_reply
from .segments_minigpt4 import Row, decode_ids, encode_rows, padded_length, truncate_rows


class MiniGPT4ImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    background_color: Color | None


class MiniGPT4ProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    images_kwargs: MiniGPT4ImagesKwargs
    _defaults = {"text_kwargs": {"padding": False}}


# Options of a tokenizer that are decided here and not by the tokenizer, which sees texts only in pieces.
_OWN_OPTIONS = (
    "padding",
    "padding_side",
    "pad_to_multiple_of",
    "truncation",
    "max_length",
    "add_special_tokens",
    "return_tensors",
    "return_attention_mask",
    "return_offsets_mapping",
    "return_token_type_ids",
    "return_mm_token_type_ids",
    "return_text_replacement_offsets",
)

# What other models take beside text and pictures, under all names that callers use.
_OTHER_MODALITIES = ("videos", "video", "audio", "audios")


class MiniGPT4Processor(ProcessorMixin, PlaceholderMixin):
    r"""
    Prepare text and pictures for [`MiniGPT4ForConditionalGeneration`].

    `<image>` in a text marks where a picture goes; it becomes `num_image_tokens` ids `image_token_id`, which no token
    of the language model has. As in the original, the text before, between and behind pictures is tokenized apart, so
    that SentencePiece tokenizers put their dummy prefix on every piece, and BOS stands once in front (released code,
    `minigpt4/models/minigpt_base.py`). A reply that is trained is a piece of its own; earlier replies in a prompt that
    asks for the next one are part of the text around them. In chats, `<image>` that a user typed stays text.

    LLaMA's tokenizer gives the original's ids in every form: slow or fast, `legacy` or not, and as transformers 5
    loads it. For that, a piece that begins with a space has its dummy prefix too, which the fast forms leave out. What
    cannot be fixed is text behind a `<s>` or `</s>` that somebody typed: with `legacy=False` it has no dummy prefix.

    Args:
        image_processor ([`MiniGPT4ImageProcessor`]): what makes pixels of pictures.
        tokenizer (`PreTrainedTokenizerBase`): that of the language model, as it is; no token is added.
        image_token_id (`int`, *optional*): `config.image_token_id` of the model. Defaults to the size of the
            tokenizer, which is right where the model's vocabulary is not larger.
        num_image_tokens (`int`, defaults to 32): `config.num_image_tokens` of the model.
        chat_template (`str`, *optional*): Jinja text, or a name that [`load_chat_template`] knows.
        image_token (`str`, defaults to `"<image>"`): what marks a picture in text.
    """

    valid_processor_kwargs = MiniGPT4ProcessorKwargs
    if IS_TRANSFORMERS_4:  # 5.x reads the signature of `__init__` instead
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

        @classmethod
        def _get_arguments_from_pretrained(cls, path: Any, **kwargs: Any) -> list[Any]:
            # AutoImageProcessor would warn that this image processor has no "fast" twin, which it needs not have.
            return [
                MiniGPT4ImageProcessor.from_pretrained(path, **kwargs),
                AutoTokenizer.from_pretrained(path, **kwargs),
            ]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_token_id: int | None = None,
        num_image_tokens: int = 32,
        chat_template: "str | Mapping[str, str] | None" = None,
        image_token: str = "<image>",
        **kwargs: Any,
    ) -> None:
        if isinstance(chat_template, str):
            chat_template = _ready(chat_template, tokenizer)
        elif isinstance(chat_template, Mapping):
            chat_template = {name: _ready(template, tokenizer) for name, template in chat_template.items()}
        self.image_token = image_token
        self.image_token_id: Any = image_token_id
        if image_token_id is None and tokenizer is not None:
            self.image_token_id = len(tokenizer)
        self.num_image_tokens = num_image_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        if tokenizer is not None:
            self._teach_tokenizer()

    @classmethod
    def from_backbones(
        cls,
        vision: Any,
        language_model: Any,
        config: Any,
        chat_template: str | None = None,
        background_color: Color | None = "white",
        **kwargs: Any,
    ) -> "MiniGPT4Processor":
        """
        Make the processor for a model that `MiniGPT4ForConditionalGeneration.from_backbones` has composed.

        Args:
            vision: repository, `"repository@revision"`, folder or dict of the vision encoder; mean, standard
                deviation and resampling filter are taken from there, the original's (CLIP, bicubic) where it has none.
            language_model: the same for the language model, whose tokenizer is used.
            config: the model's [`MiniGPT4Config`].
            chat_template: Jinja text or a name. By default the language model's own template, taught about pictures
                (`"wrapped"`), or `"vicuna_v0"` where it has none.
            background_color: what shows through transparent pixels, saved with the processor; `None` shows the colour
                stored under them, as in the original.
            **kwargs: how files are fetched (`cache_dir`, `token`, `local_files_only`, …), and `trust_remote_code`,
                for a tokenizer that brings its own code. Image processors of others are read, and never run.

        Raises:
            OSError: if there is no tokenizer.
            ValueError: if the tokenizer brings code that is not trusted.
        """
        name, where = _locate(language_model)
        trusted = bool(kwargs.pop("trust_remote_code", False))  # if it is left out, transformers asks on a terminal
        # What generation needs; trainers ask for their side themselves. An attribute set later would not be saved.
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, padding_side="left", trust_remote_code=trusted, **where, **kwargs
            )
        except ValueError as error:
            _check_trust(error, name)
            raise OSError(
                f"No tokenizer could be loaded from the language model {name!r}; put its tokenizer files beside its "
                "weights, or name a repository that has them."
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if chat_template is None:
            chat_template = "wrapped" if tokenizer.chat_template else "vicuna_v0"
        height, width = config.image_size
        return cls(
            image_processor=MiniGPT4ImageProcessor(
                size={"height": height, "width": width},
                background_color=background_color,
                **_image_statistics(vision, config, kwargs),
            ),
            tokenizer=tokenizer,
            image_token_id=config.image_token_id,
            num_image_tokens=config.num_image_tokens,
            chat_template=chat_template,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, chat_template: str | None = None, **kwargs: Any
    ) -> "MiniGPT4Processor":
        """
        Load a processor; see [`~transformers.ProcessorMixin.from_pretrained`].

        Args:
            chat_template: Jinja text or a name, instead of the template that was saved.

        Raises:
            ValueError: if the tokenizer brings code, and `trust_remote_code=True` is not given.
        """
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # nobody is asked on a terminal
        try:
            processor: MiniGPT4Processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except ValueError as error:
            _check_trust(error, pretrained_model_name_or_path)
            raise
        if chat_template is not None:
            processor.chat_template = processor._chat_template(chat_template)
        return processor

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save image processor, tokenizer, chat template and code; see [`~transformers.ProcessorMixin`]."""
        repo_id = kwargs.pop("repo_id", None) or os.path.basename(os.path.normpath(save_directory))
        saved = super().save_pretrained(save_directory, **kwargs)
        _name_tokenizer_for_all_releases(os.path.join(save_directory, "tokenizer_config.json"))
        return self.push_to_hub(repo_id, **kwargs) if push_to_hub else saved

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    @property
    def separator(self) -> str | None:
        """Text at which replies of the chat template end beside EOS: `###` of the Vicuna templates, or none."""
        if not self.chat_template or (isinstance(self.chat_template, Mapping) and "default" not in self.chat_template):
            return None
        return separator_of(self._chat_template(None), self.tokenizer)

    # ---- text and pictures ----------------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: "str | Sequence[str] | None" = None,
        **kwargs: Unpack[MiniGPT4ProcessorKwargs],  # type: ignore[misc]  # a TypedDict of transformers, untyped here
    ) -> BatchFeature:
        """
        Turn texts and pictures into model inputs.

        Args:
            images: pictures in the order of their `<image>`: PIL images, arrays, tensors, paths, URLs or base64, one,
                a list, or a list for each text.
            text: one text or a list of them; each `<image>` in it takes one picture.
            **kwargs: options of the tokenizer (`padding`, `padding_side`, `truncation`, `max_length`,
                `add_special_tokens`, `return_offsets_mapping`, …), of the image processor, and `return_tensors`.

        Returns:
            `input_ids` and `attention_mask` of shape (texts, longest text), `pixel_values` of shape (images, 3,
            height, width); with `return_mm_token_type_ids`, 1 where image tokens are. `offset_mapping` tells the
            characters of the text as it was passed; all tokens of a picture have those of its `<image>`. Labels that
            are put into the batch lose its image placeholders ([`MiniGPT4Batch`]).

        Raises:
            ValueError: if placeholders and pictures do not match, an image cannot be read, the batch is empty, or
                truncation would cut a picture.
        """
        if unknown := [name for name in _OTHER_MODALITIES if not _is_empty(kwargs.pop(name, None))]:
            raise ValueError(f"MiniGPT-4 takes text and images only; leave `{'` and `'.join(unknown)}` out.")
        if images is None and text is None:
            raise ValueError("There is nothing to process; pass `text`, `images` or both.")
        kwargs.pop("segment_mark", None)  # transformers 4.57 hands variables of the chat template on to here
        with_types = kwargs.pop("return_mm_token_type_ids", False)
        options = self._merge_kwargs(
            MiniGPT4ProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        text_options, image_options = options["text_kwargs"], options["images_kwargs"]
        tensors = text_options.get("return_tensors") or image_options.get("return_tensors")
        with_types = text_options.get("return_mm_token_type_ids", with_types)

        data: dict[str, Any] = {}
        texts = None if text is None else _as_texts(text)
        if texts is not None:
            images = self._match(texts, images)
            data.update(self._encode(texts, text_options))
            if with_types:
                data["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in ids] for ids in data["input_ids"]]
        if images is not None:
            image_options = {**image_options, "return_tensors": None}
            data.update(self.image_processor(self.image_processor.fetch_images(images), **image_options))
        return MiniGPT4Batch(data, tensor_type=tensors, image_token_id=self.image_token_id)

    def _match(self, texts: list[str], images: Any) -> list[Any] | None:
        """The pictures as one flat list, after checking that every text has as many as it has places for."""
        places = [text.count(self.image_token) for text in texts]
        if len(flatten_images(images)) > sum(places):
            self._refuse_typed(*texts)
        nested = isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images)
        if nested and len(images) == len(texts):
            given = [len(flatten_images(entry)) for entry in images]
            for row, (wanted, there) in enumerate(zip(places, given, strict=True)):
                if wanted != there:
                    raise ValueError(
                        f"Text {row} has {wanted} {self.image_token} placeholders but {there} images; give every text "
                        "one image per placeholder."
                    )
        flat = flatten_images(images)
        if sum(places) != len(flat):
            raise ValueError(
                f"The texts have {sum(places)} {self.image_token} placeholders in all but there are {len(flat)} "
                f"images; write {self.image_token} once where each image goes, and pass as many images."
            )
        return flat or None

    def _refuse_typed(self, *texts: str) -> None:
        """Tell how a picture is placed, if somebody has typed its placeholder into a message, as LLaVA's users do."""
        if any(protect_text(self.image_token, self.image_token) in text for text in texts):
            raise ValueError(
                f"{self.image_token} in the content of a message is text and no place for a picture; write the "
                'content as parts: [{"type": "image"}, {"type": "text", "text": "…"}].'
            )

    def _encode(self, texts: list[str], options: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Tokenize, truncate and pad: `input_ids`, `attention_mask` and, if asked for, `offset_mapping`, as lists."""
        self._check_placeholder()
        with_spans = bool(options.get("return_offsets_mapping"))
        max_length = options.get("max_length")
        rows = encode_rows(
            self.tokenizer,
            texts,
            self.image_token,
            self.image_token_id,
            self.num_image_tokens,
            add_special_tokens=options.get("add_special_tokens", True),
            with_spans=with_spans,
            **{name: value for name, value in options.items() if name not in _OWN_OPTIONS},
        )
        if options.get("truncation") not in (None, False, "do_not_truncate"):
            limit = self.tokenizer.model_max_length if max_length is None else max_length
            if limit < 0:
                raise ValueError(f"`max_length` is {limit}; it must be 0 or more.")
            truncate_rows(rows, limit, self.tokenizer.truncation_side, self.image_token_id)
        joined = [row.joined() for row in rows]
        length = padded_length(
            [len(ids) for ids, _ in joined], options.get("padding"), max_length, options.get("pad_to_multiple_of")
        )
        side = options.get("padding_side") or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"`padding_side` is {side!r}; it is 'left' or 'right'.")
        padded = [self._pad(row, ids, spans, length, side) for row, (ids, spans) in zip(rows, joined, strict=True)]
        data: dict[str, list[Any]] = {"input_ids": [ids for ids, _, _ in padded]}
        if options.get("return_attention_mask") is not False:
            data["attention_mask"] = [mask for _, mask, _ in padded]
        if with_spans:
            data["offset_mapping"] = [spans for _, _, spans in padded]
        return data

    def _check_placeholder(self) -> None:
        """Raise a `ValueError` if a token of text has the id of the image placeholder, as added ones may."""
        own = type(self.tokenizer).convert_ids_to_tokens  # its object knows the placeholder too
        try:
            token = own(self.tokenizer, self.image_token_id)
        except IndexError:  # of SentencePiece, which has no such id
            return
        if token not in (None, "", self.image_token, self.tokenizer.unk_token):
            raise ValueError(
                f"The tokenizer's token {token!r} has the id {self.image_token_id}, which marks pictures, so text "
                "would be taken for one. After adding tokens, call `model.resize_token_embeddings(len(processor."
                "tokenizer))` and set `processor.image_token_id = model.config.image_token_id`."
            )

    def _pad(
        self, row: Row, ids: list[int], spans: list[tuple[int, int]], length: int | None, side: str
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Ids, attention mask and spans of one row, padded to `length`."""
        gap = 0 if length is None else length - len(ids)
        if gap and self.tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no pad token, which texts of different lengths need; set one, such as "
                "`processor.tokenizer.pad_token = processor.tokenizer.eos_token`."
            )
        pads, zeros, ones = [self.tokenizer.pad_token_id] * gap, [0] * gap, [1] * len(ids)
        if side == "left":
            return pads + ids, zeros + ones, [(0, 0)] * gap + spans
        end = len(row.text)
        return ids + pads, ones + zeros, spans + [(end, end)] * gap

    # ---- chats ----------------------------------------------------------------------------------------------------

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """
        Render a chat, or a batch of chats, and tokenize it with its pictures if `tokenize=True`.

        Takes every option of [`~transformers.ProcessorMixin.apply_chat_template`]. Contents may be strings or lists of
        parts; a picture is `{"type": "image"}` with `image`, `url`, `path` or `base64`, or OpenAI's `image_url`, and
        goes to the place in the message where it stands. `<image>` in the text of a message stays text. A separator at
        the end of a reply is written once.

        Args:
            conversation: list of messages, or a list of such lists.
            chat_template: Jinja text, or a name that [`load_chat_template`] knows; the processor's own by default.

        Raises:
            ValueError: if the conversation is empty or a message is not understood.
        """
        template = self._chat_template(chat_template)
        if self.image_token != "<image>":
            template = template.replace("<image>", self.image_token)
        chats, batched = normalize_conversations(conversation, self.image_token)
        close_replies_once(chats, lambda: separator_of(template, self.tokenizer))
        if kwargs.get("tokenize") and (images := kwargs.pop("images", None)) is not None:
            flat = flatten_images(images)
            if (places := place_images(chats, flat)) != len(flat):
                texts = (part.get("text") or "" for chat in chats for message in chat for part in message["content"])
                self._refuse_typed(*texts if places < len(flat) else ())
                raise ValueError(
                    f"The messages have {places} places for {len(flat)} images; give every image a part of its own: "
                    '{"type": "image"}.'
                )
        if kwargs.get("tokenize") and "segment_mark" in template:
            kwargs["segment_mark"] = SEGMENT_MARK
        elif "segment_mark" not in template:
            kwargs.pop("segment_mark", None)  # which only some templates know
        with RENDERING:
            return super().apply_chat_template(chats if batched else chats[0], chat_template=template, **kwargs)

    def _chat_template(self, template: str | None) -> str:
        """The Jinja text to render; one that knows nothing of parts is wrapped, so that pictures have a place."""
        own = self.chat_template
        if isinstance(own, Mapping):
            if template is None and "default" not in own:
                raise ValueError(
                    "The processor has several chat templates and none of them is called 'default'; pass "
                    f"`chat_template` with one of their names: {', '.join(own)}."
                )
            template = own.get(template or "default", template)
        template = own if template is None else template
        if template is None:
            raise ValueError(
                "The processor has no chat template; pass `chat_template`, such as 'vicuna_v0', or set "
                "`processor.chat_template`."
            )
        if not _is_jinja(template):
            return load_chat_template(template, self.tokenizer)
        return template if knows_parts(template, self.tokenizer) else wrap_chat_template(self.tokenizer, template)

    # ---- text from ids --------------------------------------------------------------------------------------------

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """
        Text of ids, of one row or of a batch.

        With `skip_special_tokens`, image tokens are left out, and so is a separator at the very end, which is the
        template's EOS; without, each picture is one `<image>`.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, (list, tuple)) and ids and not isinstance(ids[0], int):
            return self.batch_decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        text = self._decode_row([ids] if isinstance(ids, int) else list(ids), skip_special_tokens, kwargs)
        return self._without_separator(text, ids, kwargs) if skip_special_tokens else text

    def _decode_row(self, ids: list[int], skip_special_tokens: bool, kwargs: dict[str, Any]) -> str:
        placeholder = "" if skip_special_tokens else self.image_token
        options = {"skip_special_tokens": skip_special_tokens, **kwargs}
        return decode_ids(self.tokenizer, ids, placeholder, self.image_token_id, self.num_image_tokens, options)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Texts of a batch of ids; see `decode`."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs) for ids in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """
        Replies as text, cut where the separator (`###`) begins, and without white space around them.

        A prompt in front stays as it is. It is known by its BOS or its pictures, without a BOS token by the template's
        words before a reply; where these are missing, only a separator at the very end goes.

        Args:
            generated_outputs: ids of shape (batch_size, length) or (length,) as `generate` gives them, with the
                prompt in front or without.
            skip_special_tokens: leave out BOS, EOS, pads and image tokens. With `False` they stay, except for EOS and
                pads behind a reply that the separator could have ended; `decode` gives all of them.
        """
        ids = generated_outputs.tolist() if hasattr(generated_outputs, "tolist") else generated_outputs
        rows = [ids] if len(ids) and isinstance(ids[0], int) else ids
        separator = self.separator
        if separator is None:
            return [self._decode_row(list(row), skip_special_tokens, kwargs) for row in rows]
        opening = reply_opening_of(self._chat_template(None), self.tokenizer)
        return [self._reply(list(row), opening, separator, skip_special_tokens, kwargs) for row in rows]

    def _reply(
        self, ids: list[int], opening: str, separator: str, skip_special_tokens: bool, kwargs: dict[str, Any]
    ) -> str:
        """The text of a row whose reply the separator ends."""
        behind = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        while not skip_special_tokens and ids and ids[-1] in behind:
            del ids[-1]
        text = self._decode_row(ids, skip_special_tokens, kwargs)
        if not self._has_prompt(ids, text, opening):
            return cut_reply(text, separator)
        cut = cut_behind_prompt(text, opening, separator)
        return self._without_separator(text, ids, kwargs) if cut is None else cut

    def _has_prompt(self, ids: Sequence[int], text: str, opening: str) -> bool:
        """Whether ids begin with BOS, pads aside, or have a picture, as no reply does."""
        bos, pad = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
        if self.image_token_id in ids:
            return True
        if bos is None:
            return bool(opening) and opening in text
        return bos == next((token for token in ids if token != pad or token == bos), None)

    # ---- what inference servers ask -------------------------------------------------------------------------------

    def replace_image_token(self, image_inputs: Any = None, image_idx: int = 0, **kwargs: Any) -> str:
        """The text that one `<image>` stands for: as many of them as a picture has tokens."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Image tokens and patches of pictures of the given (height, width); the same for every size."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)


def _is_empty(value: Any) -> bool:
    """Whether there is nothing: `None`, or lists of nothing."""
    return value is None or (isinstance(value, (list, tuple)) and all(map(_is_empty, value)))


def _is_jinja(text: str) -> bool:
    return "{" in text


def _ready(template: str, tokenizer: Any) -> str:
    """A named template as Jinja text, and one for strings wrapped, so that a saved folder needs no file of ours."""
    if not _is_jinja(template):
        return load_chat_template(template, tokenizer)
    can_wrap = tokenizer is not None and available_chat_templates()
    return wrap_chat_template(tokenizer, template) if can_wrap and not knows_parts(template, tokenizer) else template


def _as_texts(text: Any) -> list[str]:
    """One text or several as a list, or an error that says what is wrong."""
    texts: list[Any] = [text]
    if isinstance(text, (list, tuple)):
        texts = list(text)
    if not texts:
        raise ValueError("The batch is empty; pass at least one text.")
    if not all(isinstance(entry, str) for entry in texts):
        raise ValueError("`text` must be a string or a list of strings; chats go to `apply_chat_template`.")
    return texts


def _locate(source: Any) -> tuple[str, dict[str, Any]]:
    """Name and fetching options of a repository, `"repository@revision"`, folder, or a dict of these."""
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise ValueError(
            f"A backbone is a {type(source).__name__}; name a repository or folder, or a dict with `name_or_path`."
        )
    spec = dict(source) if isinstance(source, Mapping) else {"name_or_path": os.fspath(source)}
    name = str(spec["name_or_path"])
    if not os.path.isdir(name) and "@" in name:
        name, spec["revision"] = name.rsplit("@", 1)
    return name, {key: spec[key] for key in ("revision", "subfolder") if spec.get(key)}


def _check_trust(error: ValueError, name: Any) -> None:
    """Tell in one sentence what transformers tells in several, if a tokenizer's code is not trusted."""
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"The tokenizer of {name} brings its own code, which would run on this machine; look at it, and if you "
            "trust it, pass `trust_remote_code=True` (on the command line `--trust_remote_code true`)."
        ) from error


def _image_statistics(vision: Any, config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, standard deviation and filter of a vision encoder's own image processor, as far as it has one."""
    if (timm := getattr(config.vision_config, "pretrained_cfg", None)) is not None:
        filters = {"bicubic": PILImageResampling.BICUBIC, "bilinear": PILImageResampling.BILINEAR}
        resample = filters.get(timm["interpolation"], PILImageResampling.BICUBIC)
        return {"image_mean": list(timm["mean"]), "image_std": list(timm["std"]), "resample": resample}
    name, where = _locate(vision)
    try:
        found, _ = MiniGPT4ImageProcessor.get_image_processor_dict(name, **where, **options)
    except OSError:
        return {}
    wanted = ("image_mean", "image_std", "resample", "rescale_factor", "do_normalize", "do_rescale")
    return {key: found[key] for key in wanted if found.get(key) is not None}


def _name_tokenizer_for_all_releases(path: str) -> None:
    """Give a tokenizer that transformers 5 calls `TokenizersBackend` the name that 4.57 knows as well."""
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            with open(path, "w", encoding="utf-8") as file:
                json.dump(settings, file, indent=2, ensure_ascii=False)
                file.write("\n")


MiniGPT4Processor.register_for_auto_class()

__all__ = ["MiniGPT4Processor"]
