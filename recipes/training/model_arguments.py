"""Which model a stage trains. Importing this file is cheap."""

from dataclasses import dataclass, field
from typing import Any

from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.ranges import check_ranges


# Fields of a new projection and of what it is given, as they are called in the model's configuration.
NEW_FIELDS = (
    "projector_num_layers",
    "projector_norm",
    "projector_init",
    "patch_merge_size",
    "patch_merge_layout",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "image_size",
)
WITHOUT_QFORMER = ("patch_merge_size", "patch_merge_layout")
CHOICES = {
    "projector_init": ("linear", "embeddings"),
    "patch_merge_layout": ("consecutive", "square"),
    "vision_feature_select_strategy": ("default", "full"),
}


@dataclass
class ModelArguments:
    """Which parts the model is made of, and which of them train."""

    # The parts
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Adapter to continue from, a folder or a repository. Stage 2 starts from what stage 1 saved. With "
            "it, vision, qformer and language_model only say where backbones have moved to."
        },
    )
    vision: str | None = field(
        default=None, metadata={"help": "Vision encoder: repository, repository@revision, folder or `tiny`."}
    )
    qformer: str | None = field(
        default=None, metadata={"help": "BLIP-2 repository with a Q-Former, folder or `tiny`. Default: none."}
    )
    language_model: str | None = field(
        default=None, metadata={"help": "Language model: repository, repository@revision, folder or `tiny`."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code that a part brings, on this machine. Look at it first. Default: false."},
    )
    projector_num_layers: int | None = field(
        default=None,
        metadata={"help": "Linear layers of a new projection. The ablation of the paper has 3. Default: 1."},
    )
    projector_norm: bool | None = field(
        default=None,
        metadata={
            "help": "Normalize features before a new projection. The original does not. Default: yes, but not between "
            "the original's parts."
        },
    )
    projector_init: str | None = field(
        default=None,
        metadata={
            "help": "How a new projection starts: linear, the original's way, or embeddings, where image tokens begin "
            "spread as words are. Default: embeddings, but linear between the original's parts."
        },
    )
    patch_merge_size: int | None = field(
        default=None,
        metadata={"help": "Patches that become one image token, where there is no Q-Former. Default: up to 4."},
    )
    patch_merge_layout: str | None = field(
        default=None,
        metadata={
            "help": "Which patches are joined: `square` takes neighbours, 2 × 2 for a size of 4, `consecutive` those "
            "of a row, as the original does. Default: square where squares fit, consecutive for BLIP-2's encoder."
        },
    )
    vision_feature_select_strategy: str | None = field(
        default=None,
        metadata={
            "help": "Which tokens of the encoder are used: `full` keeps all of them, `default` drops those in front "
            "of the patches, CLS and registers. Default: full with a Q-Former, default without."
        },
    )
    vision_feature_layer: int | None = field(
        default=None,
        metadata={"help": "Hidden state of the encoder, such as -2 for the last but one. Default: the last one."},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width of pictures in pixels. Default: those of the encoder."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template of the published processor: vicuna_v0, llama2, wrapped or Jinja. `wrapped` is the "
            "language model's own. Default: that if there is one, otherwise vicuna_v0."
        },
    )

    # What trains beside the projection
    train_parts: list[str] = field(
        default_factory=list,
        metadata={"help": "Parts that train beside the projection: vision, qformer, language_model. Default: none."},
    )
    peft_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Adapter of PEFT on the language model, trained beside the projection. The fields of its "
            'configuration, as in {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}; JSON on the '
            "command line. Default: none."
        },
    )

    # How the frozen weights are kept and computed
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the frozen weights: float32, bfloat16 or float16. `auto` takes the type of mixed "
            "precision, or float32 without a GPU. The projection stays in float32."
        },
    )
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "Load the language model in fewer bits: bnb-int8, bnb-nf4 or torchao-int8. Nothing else is, and "
            "checkpoints are the same with and without it. Default: none."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers: eager, sdpa, flash_attention_2, …"}
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("model_name_or_path", "vision", "qformer", "language_model"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise RecipeError(f"--{name} is {getattr(self, name)!r}; it has to be a repository or a folder.")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) is not None and value not in choices:
                raise RecipeError(f"--{name} is {value!r}; it has to be {' or '.join(choices)}.")

    def new_fields(self) -> dict[str, Any]:
        """
        Fields of the configuration of a new model that are given.

        Raises:
            RecipeError: for one that has no effect.
        """
        given = {name: value for name in NEW_FIELDS if (value := getattr(self, name)) is not None}
        if self.qformer and (idle := [name for name in WITHOUT_QFORMER if name in given]):
            raise RecipeError(f"--{idle[0]} has no effect beside --qformer, whose queries become the image tokens.")
        return given

    def check_saved_fields(self, config: Any) -> None:
        """
        Refuse fields of a new model that are not those of a saved one.

        Args:
            config: of the saved model.
        """
        for name in NEW_FIELDS:
            given, saved = getattr(self, name), getattr(config, name)
            if given is not None and saved not in (given, (given, given)):
                raise RecipeError(
                    f"{name} is {given}, but the model of {self.model_name_or_path} has {_told(saved)}; leave it out."
                )


def _told(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, tuple) else str(value)
