"""Which model a stage trains. Importing this file is cheap."""

from dataclasses import dataclass, field
from typing import Any

from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.ranges import check_ranges


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
