"""The official files of MiniGPT-4 at any size, made in code, and the model that they have to become."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from modeling_minigpt4.convert_minigpt4_to_hf import convert_original_checkpoint, convert_original_state_dict


def original_tensors(
    width: int = 24, mlp: int = 40, blocks: int = 2, patch: int = 7, grid: int = 4,
    qformer: int | None = 16, intermediate: int = 20, layers: int = 4, queries: int = 3,
    vocabulary: int = 50, hidden: int = 32, feed_forward: int = 48, llama_layers: int = 2, key_heads: int = 16,
    seed: int = 0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A whole state dict of the released code at any size, written out from its modules; `qformer=None` for none."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = torch.randn(*shape, generator=generator) * 0.2

    def affine(name: str, *shape: int) -> None:
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])

    add("visual_encoder.cls_token", 1, 1, width)
    add("visual_encoder.pos_embed", 1, grid * grid + 1, width)
    affine("visual_encoder.patch_embed.proj", width, 3, patch, patch)
    for n in range(blocks):
        block = f"visual_encoder.blocks.{n}"
        affine(f"{block}.norm1", width)
        add(f"{block}.attn.q_bias", width)
        add(f"{block}.attn.v_bias", width)
        add(f"{block}.attn.qkv.weight", 3 * width, width)
        affine(f"{block}.attn.proj", width, width)
        affine(f"{block}.norm2", width)
        affine(f"{block}.mlp.fc1", mlp, width)
        affine(f"{block}.mlp.fc2", width, mlp)
    affine("ln_vision", width)
    if qformer is not None:
        add("query_tokens", 1, queries, qformer)
        tensors["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
        affine("Qformer.bert.embeddings.LayerNorm", qformer)
        for n in range(layers):
            layer = f"Qformer.bert.encoder.layer.{n}"
            for kind, source in (("attention", qformer), ("crossattention", width))[: 2 - n % 2]:
                affine(f"{layer}.{kind}.self.query", qformer, qformer)
                affine(f"{layer}.{kind}.self.key", qformer, source)
                affine(f"{layer}.{kind}.self.value", qformer, source)
                affine(f"{layer}.{kind}.output.dense", qformer, qformer)
                affine(f"{layer}.{kind}.output.LayerNorm", qformer)
            affine(f"{layer}.intermediate_query.dense", intermediate, qformer)
            affine(f"{layer}.output_query.dense", qformer, intermediate)
            affine(f"{layer}.output_query.LayerNorm", qformer)
    affine("llama_proj", hidden, 4 * width if qformer is None else qformer)
    add("llama_model.model.embed_tokens.weight", vocabulary, hidden)
    for n in range(llama_layers):
        layer = f"llama_model.model.layers.{n}"
        tensors[f"{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (key_heads, hidden),
            "self_attn.v_proj": (key_heads, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (feed_forward, hidden), "mlp.up_proj": (feed_forward, hidden),
            "mlp.down_proj": (hidden, feed_forward),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }.items():  # fmt: skip
            add(f"{layer}.{name}.weight", *shape)
    add("llama_model.model.norm.weight", hidden)
    add("llama_model.lm_head.weight", vocabulary, hidden)
    return tensors


def config_of(qformer: bool = True, **fields) -> MiniGPT4Config:
    """The sizes that `original_tensors` has by default."""
    vision = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 7,
    }  # fmt: skip
    text = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    qformer_config = {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 8,
    }  # fmt: skip
    return MiniGPT4Config(
        vision_config=vision,
        qformer_config=qformer_config if qformer else None,
        text_config=text,
        num_query_tokens=3,
        **fields,
    )


def save_checkpoint(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """A file as the original's trainer saves it: what trained, with the state of optimizer and scaler beside it."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    content = {
        "model": tensors, "optimizer": optimizer.state_dict(), "config": {"run": {"task": "image_text_pretrain"}},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0}, "epoch": 3,
    }  # fmt: skip
    torch.save(content, path)
    return str(path)


def save_llama(tensors: dict[str, torch.Tensor], folder: Path, tokenizer, **saving) -> str:
    """Write the language model of a state dict as a folder: sharded, or with `binary=True` as `.bin`."""
    hidden = tensors["llama_model.model.embed_tokens.weight"].shape
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=hidden[0], hidden_size=hidden[1], intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    own = {n.removeprefix("llama_model."): t for n, t in tensors.items() if n.startswith("llama_model.")}
    model.load_state_dict({name: tensor for name, tensor in own.items() if "inv_freq" not in name})
    if saving.pop("binary", False):
        save_binary(model, folder)
    else:
        model.save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_binary(model: LlamaForCausalLM, folder: Path) -> None:
    """Two `.bin` shards and their index, as repositories of 2023 have them."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    names = sorted(model.state_dict())
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in shards.items():
        torch.save({name: model.state_dict()[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pick(tensors: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


class Files:
    """The official files of one model, and the model they have to become."""

    def __init__(self, folder: Path, qformer: bool = True, vocabulary: int = 320) -> None:
        """`vocabulary` is more than the tokenizer has, as Vicuna v0's is."""
        tensors = original_tensors(qformer=16 if qformer else None, vocabulary=vocabulary, blocks=3)
        vit = pick(tensors, "visual_encoder.")
        # The file of EVA-CLIP has no prefix, half precision and one block too many.
        torch.save({n.removeprefix("visual_encoder."): t.half() for n, t in vit.items()}, folder / "eva_vit_g.pth")
        self.tensors = {name: tensor for name, tensor in tensors.items() if ".blocks.2." not in name}
        self.tensors.update({n: t.half().float() for n, t in pick(self.tensors, "visual_encoder.").items()})
        ignored = {
            "t5_proj.weight": torch.ones(2), "Qformer.cls.predictions.bias": torch.ones(2),
            "Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.ones(2, 2),
        }  # fmt: skip
        blip2 = pick(tensors, "query_tokens", "Qformer.", "ln_vision.")
        torch.save({"model": {**blip2, **ignored}}, folder / "blip2.pth")
        self.checkpoint = save_checkpoint(folder / "minigpt4.pth", pick(tensors, "llama_proj."))
        self.vit, self.qformer = str(folder / "eva_vit_g.pth"), str(folder / "blip2.pth") if qformer else None
        self.config = config_of(qformer, vision_post_layernorm_eps=1e-5)
        self.config.text_config.vocab_size = vocabulary
        self.config.image_token_id = vocabulary

    def expected(self) -> MiniGPT4ForConditionalGeneration:
        """The same model, put together by hand."""
        tensors = dict(self.tensors)
        if self.qformer is None:  # nothing trains or loads ln_vision then
            tensors |= {"ln_vision.weight": torch.ones(24), "ln_vision.bias": torch.zeros(24)}
        model = MiniGPT4ForConditionalGeneration(self.config).eval()
        model.load_state_dict(convert_original_state_dict(tensors))
        return model

    def convert(self, language_model: str, output: Path, **options) -> MiniGPT4ForConditionalGeneration:
        vision = {"vit": self.vit, "qformer": self.qformer, "config": self.config}
        if "vision_backbone" in options:
            vision = {}
        return convert_original_checkpoint(self.checkpoint, language_model, output, **{**vision, **options})


@torch.no_grad()
def logits(model: MiniGPT4ForConditionalGeneration) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, *model.config.image_size, generator=generator)
    ids = [[1, 5, *[model.config.image_token_id] * model.config.num_image_tokens, 9, 11]]
    return model.float()(input_ids=torch.tensor(ids), pixel_values=pixels).logits
