"""Make the frozen backbones of the embedded world: `python -m recipes_minigpt4.tiny.pretrain --output_dir DIR`.

`blip2/`  a vision encoder and a Q-Former (transformers' own BLIP-2 modules) that learn, through a linear layer thrown
          away afterwards, to carry one word per query: size, colour, shape, row and column of each thing in reading
          order, and the background. They see no reserved scene and no held-out pair.
`llama/`  a LlamaForCausalLM and its byte-level BPE tokenizer that read `corpus.document`s and never see an image.

Both are then trained a little longer, from what was saved: the vision side so that a query's features say nothing but
its word (`sharpen`), the language model so that it reads words that are only nearly right (`harden`). One linear layer
cannot clean up the former, and a large language model needs not be taught the latter.

Both are rounded to float16 on disk (the configurations say float32, which is how they load). The same seed, thread
count and versions of torch and transformers give the same weights. The logs beside the weights tell how long it took.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from recipes_minigpt4.tiny import corpus
from recipes_minigpt4.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    MAX_THINGS,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    draw_scene,
    sample_scenes,
)
from recipes_minigpt4.utils.command_line import SpellingParser
from recipes_minigpt4.utils.ranges import COUNT, POSITIVE, SEED, in_range


IMAGE_SIZE = 72  # pixels; a patch of 12 is a quarter of a cell
PATCH_SIZE = 12
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
POST_LAYERNORM_EPS = 1e-5  # MiniGPT-4's ln_vision; the norms inside the encoder use 1e-6

WORDS = ("nothing", *SIZES, *COLOURS, *SHAPES, *ROWS, *COLUMNS, *BACKGROUNDS)
WORDS_PER_THING = 5
NUM_QUERY_TOKENS = WORDS_PER_THING * MAX_THINGS + 1

Log = Callable[[str], None]


def cosine(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Learning rate: linear warm-up, then cosine to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def optimizer_for(modules: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in modules.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in modules.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))


def update(modules: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """One step of gradient descent at learning rate `lr`, gradient norm clipped to 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
    optimizer.step()


def save_half(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as float16 safetensors."""
    halves = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in tensors.items()}
    save_file(halves, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes files that only their owner can read


# --- vision ----------------------------------------------------------------------------------------------------------


VISION_CONFIG = Blip2VisionConfig(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=IMAGE_SIZE,
    patch_size=PATCH_SIZE,
    layer_norm_eps=1e-6,
    initializer_range=0.02,
)
QFORMER_CONFIG = Blip2QFormerConfig(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    encoder_hidden_size=VISION_CONFIG.hidden_size,
    cross_attention_frequency=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    vocab_size=1,
)
# BLIP-2's layout asks for a language model too: the folder names a minute one and holds no weights of it.
UNUSED_TEXT_CONFIG = OPTConfig(
    vocab_size=4, hidden_size=4, num_hidden_layers=1, ffn_dim=4, num_attention_heads=1, word_embed_proj_dim=4
)


class VisionSide(nn.Module):
    """BLIP-2's vision modules under BLIP-2's names, plus two word classifiers that are thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_model = Blip2VisionModel(VISION_CONFIG)
        self.vision_model.post_layernorm.eps = POST_LAYERNORM_EPS
        self.qformer = Blip2QFormerModel(QFORMER_CONFIG)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, NUM_QUERY_TOKENS, QFORMER_CONFIG.hidden_size))
        self.query_head = nn.Linear(QFORMER_CONFIG.hidden_size, len(WORDS))
        self.patch_head = nn.Linear(VISION_CONFIG.hidden_size, 3 * len(WORDS))

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Features for pixels of shape (B, 3, 72, 72): of the patches, CLS token first, (B, 1 + patches, C), and of
        the queries, (B, num_query_tokens, C).
        """
        image_embeds = self.vision_model(pixel_values=pixel_values).last_hidden_state
        query_output = self.qformer(
            query_embeds=self.query_tokens.expand(len(image_embeds), -1, -1), encoder_hidden_states=image_embeds
        ).last_hidden_state
        return image_embeds, query_output

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Word scores for pixels of shape (B, 3, 72, 72): of the queries, (B, num_query_tokens, words), and of the
        patches, (B, patches, 3, words), which should say size, colour and shape of what stands in their cell.
        """
        image_embeds, query_output = self.encode(pixel_values)
        return self.query_head(query_output), self.patch_head(image_embeds[:, 1:]).unflatten(-1, (3, -1))


def pixels(images: list[Image.Image]) -> Tensor:
    """Pixel values (B, 3, 72, 72): bicubic resize, 0–1, CLIP statistics."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in images]
    values = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def query_words(scene: Scene) -> list[int]:
    """What each query should say: an index into `WORDS` per query."""
    words = [
        word for thing in scene.things for word in (thing.size, thing.colour, thing.shape, thing.row, thing.column)
    ]
    words += ["nothing"] * (NUM_QUERY_TOKENS - 1 - len(words)) + [scene.background]
    return [WORDS.index(word) for word in words]


def patch_words(scene: Scene) -> list[list[int]]:
    """What each patch should say, row by row: three indices into `WORDS` per patch."""
    cells = {(thing.row, thing.column): (thing.size, thing.colour, thing.shape) for thing in scene.things}
    side = IMAGE_SIZE // PATCH_SIZE
    spread = side // len(ROWS)  # patches per cell, each way
    return [
        [WORDS.index(word) for word in cells.get((ROWS[row // spread], COLUMNS[column // spread]), ("nothing",) * 3)]
        for row in range(side)
        for column in range(side)
    ]


def picture_batch(scenes: list[Scene], rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (B, 3, 72, 72) of scenes drawn at various sizes; the words of their queries (B, num_query_tokens) and of
    their patches (B, patches, 3).
    """
    images = [draw_scene(scene, rng.choice((72, 96, 128))) for scene in scenes]
    for_queries = torch.tensor([query_words(scene) for scene in scenes])
    return pixels(images), for_queries, torch.tensor([patch_words(scene) for scene in scenes])


def pretrain_vision(steps: int, batch_size: int, lr: float, seed: int, log: Log) -> VisionSide:
    """Teach the vision side to say each scene's words. Reserved scenes and held-out pairs are never shown."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    side = VisionSide()
    optimizer = optimizer_for(side)
    started = time.perf_counter()
    for step in range(steps):
        shown = sample_scenes(rng, batch_size, lambda scene: not scene.is_reserved and not scene.has_held_out_pair)
        pixel_values, query_targets, patch_targets = picture_batch(shown, rng)
        query_scores, patch_scores = side(pixel_values)
        query_loss = nn.functional.cross_entropy(query_scores.flatten(0, 1), query_targets.flatten())
        patch_loss = nn.functional.cross_entropy(patch_scores.flatten(0, 2), patch_targets.flatten())
        update(side, optimizer, query_loss + patch_loss, cosine(step, steps, lr))
        if step % 100 == 0 or step == steps - 1:
            losses = f"loss of queries {query_loss:.4f}, of patches {patch_loss:.4f}"
            log(f"vision step {step:5d}  {losses}  {time.perf_counter() - started:.0f} s")
    return side


def sharpen_vision(side: VisionSide, steps: int, batch_size: int, lr: float, seed: int, log: Log) -> None:
    """Make each query's features a code of its word, whatever else is in the picture.

    Classifying words leaves a rest in the features that tells of neighbours. Regression on fixed orthogonal codes, one
    per word, removes it; the code matrix is then the classifier, as its nearest code is a feature's best score.
    """
    rng = random.Random(f"sharpen, seed {seed}")
    codes = word_codes(seed)
    modules = nn.ModuleList([side.vision_model, side.qformer])
    optimizer = optimizer_for(modules)
    started = time.perf_counter()
    for step in range(steps):
        shown = sample_scenes(rng, batch_size, lambda scene: not scene.is_reserved and not scene.has_held_out_pair)
        pixel_values, query_targets, _ = picture_batch(shown, rng)
        loss = (side.encode(pixel_values)[1] - codes[query_targets]).square().mean()
        update(modules, optimizer, loss, cosine(step, steps, lr, warmup=100))
        if step % 100 == 0 or step == steps - 1:
            log(f"sharpen step {step:5d}  squared error {loss:.4f}  {time.perf_counter() - started:.0f} s")
    side.query_head.load_state_dict({"weight": codes, "bias": torch.zeros(len(WORDS))})


def word_codes(seed: int) -> Tensor:
    """Orthogonal vectors (words, C) with a mean square of one, which is what a LayerNorm gives."""
    generator = torch.Generator().manual_seed(seed)
    codes: Tensor = torch.linalg.qr(torch.randn(QFORMER_CONFIG.hidden_size, len(WORDS), generator=generator)).Q.T
    return codes.contiguous() * math.sqrt(QFORMER_CONFIG.hidden_size)


def load_vision(folder: Path, seed: int) -> VisionSide:
    """What `save_vision` wrote, with new classifiers."""
    torch.manual_seed(seed)
    side = VisionSide()
    side.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return side


def is_unseen(scene: Scene, held_out: bool) -> bool:
    """Whether a scene is kept for evaluation and has, or has not, a held-out pair."""
    return scene.is_reserved and scene.has_held_out_pair is held_out


@torch.inference_mode()
def check_vision(side: VisionSide, log: Log) -> None:
    """Log the share of words that the queries carry, on reserved scenes without and with held-out pairs."""
    rng = random.Random("check")
    for held_out in (False, True):
        scenes = sample_scenes(rng, 500, partial(is_unseen, held_out=held_out))
        pixel_values, words, _ = picture_batch(scenes, rng)
        right = side(pixel_values)[0].argmax(-1) == words
        log(
            f"vision check, reserved scenes {'with' if held_out else 'without'} held-out pairs: "
            f"{right.float().mean():.4f} of words, {right.all(-1).float().mean():.4f} of scenes without a mistake"
        )


def save_vision(side: VisionSide, folder: Path) -> None:
    """Write the vision side as a BLIP-2 folder that holds `vision_model.*`, `qformer.*` and `query_tokens` only."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Blip2Config(
        vision_config=VISION_CONFIG.to_dict(),
        qformer_config=QFORMER_CONFIG.to_dict(),
        text_config=UNUSED_TEXT_CONFIG.to_dict(),
        num_query_tokens=NUM_QUERY_TOKENS,
        dtype=torch.float32,
    )
    config.save_pretrained(folder)
    tensors = {name: tensor for name, tensor in side.state_dict().items() if "_head." not in name}
    save_half(tensors, folder / "model.safetensors")


# --- language --------------------------------------------------------------------------------------------------------


def train_tokenizer(seed: int, documents: int = 20_000, vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the corpus. `###` is split off, so that it is the same token after any sentence."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("###"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in ("<pad>", "<s>", "</s>")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((segment for _ in range(documents) for segment in corpus.document(rng)), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def language_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The sizes of the language model."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, segments: list[str]) -> list[int]:
    """BOS and the ids of each segment, tokenized on its own."""
    ids: list[int] = [tokenizer.bos_token_id]
    for segment in tokenizer(segments, add_special_tokens=False)["input_ids"]:
        ids += segment
    return ids


def token_batches(tokenizer: PreTrainedTokenizerFast, batch_size: int, rng: random.Random) -> Iterator[Tensor]:
    """Endless batches of token ids (B, T), padded at the right; documents of similar length go together."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    while True:
        rows = [[*token_ids(tokenizer, corpus.document(rng)), eos] for _ in range(16 * batch_size)]
        rows.sort(key=len)
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            longest = max(map(len, batch))
            yield torch.tensor([row + [pad] * (longest - len(row)) for row in batch])


def language_loss(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean next-token loss over a batch (B, T), pads left out. Pads stand at the end, so causality masks them."""
    targets = tokens.masked_fill(tokens.eq(model.config.pad_token_id), -100)
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def pretrain_language(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    log: Log,
) -> None:
    """Teach the language model the corpus, every token of it."""
    optimizer = optimizer_for(model)
    batches = token_batches(tokenizer, batch_size, random.Random(seed))
    started = time.perf_counter()
    for step in range(steps):
        loss = language_loss(model, next(batches))
        update(model, optimizer, loss, cosine(step, steps, lr))
        if step % 100 == 0 or step == steps - 1:
            log(f"language step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - started:.0f} s")


def notes_place(segments: list[str]) -> int | None:
    """Which segment of a document holds the notes, that is, stands where an image will."""
    if segments[0].endswith("<Img>"):
        return 1
    return 0 if len(segments) > 1 and not segments[0].startswith("###") else None


def noisy_batches(
    tokenizer: PreTrainedTokenizerFast, batch_size: int, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of token ids (B, T), padded at the right, and a mask (B, T) of the tokens of notes."""
    while True:
        rows = []
        for _ in range(16 * batch_size):
            segments = corpus.document(rng)
            place = notes_place(segments)
            pieces = tokenizer(segments, add_special_tokens=False)["input_ids"]
            mask = [int(i == place) for i, piece in enumerate(pieces) for _ in piece]
            ids = [token for piece in pieces for token in piece]
            rows.append(([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], [0, *mask, 0]))
        rows.sort(key=lambda row: len(row[0]))
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            longest = max(len(ids) for ids, _ in batch)
            tokens = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in batch]
            masks = [mask + [0] * (longest - len(mask)) for _, mask in batch]
            yield torch.tensor(tokens), torch.tensor(masks)


def blur(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Embeddings (B, T, C) with noise, and a share of another token of the row, where the mask (B, T) is 1."""
    rows = len(embeddings)
    spread = embeddings.detach().std()
    noise = torch.rand(rows, 1, 1) * 0.5 * spread * torch.randn_like(embeddings)
    shift = int(torch.randint(1, 7, ()))
    leak = torch.rand(rows, 1, 1) * 0.3 * embeddings.detach().roll(shift, dims=1)
    return embeddings + mask[..., None] * (noise + leak)


def harden_language(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    log: Log,
) -> None:
    """Teach the language model to read notes whose embeddings are blurred. It still sees nothing but text."""
    torch.manual_seed(seed)
    optimizer = optimizer_for(model)
    batches = noisy_batches(tokenizer, batch_size, random.Random(f"harden, seed {seed}"))
    started = time.perf_counter()
    for step in range(steps):
        tokens, mask = next(batches)
        embeddings = blur(model.get_input_embeddings()(tokens), mask)
        targets = tokens.masked_fill(tokens.eq(model.config.pad_token_id), -100)
        logits = model(inputs_embeds=embeddings).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        update(model, optimizer, loss, cosine(step, steps, lr, warmup=100))
        if step % 100 == 0 or step == steps - 1:
            log(f"harden step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - started:.0f} s")


def save_language(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the language model, its generation defaults and its tokenizer as an ordinary Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    save_half(model.state_dict(), folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name that 4.57 does not know
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def generate_samples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, log: Log, count: int = 4
) -> None:
    """Log greedy replies to written notes, the last of them careless: it speaks before anything is projected in."""
    rng = random.Random(f"samples, seed {seed}")
    scenes = sample_scenes(rng, count, lambda scene: scene.is_reserved)
    for scene in scenes:
        segments = [
            "###Human: <Img>",
            corpus.notes(scene, rng, careless=scene is scenes[-1]),
            f"</Img> {corpus.DESCRIBE[0]} ###Assistant: ",
        ]
        ids = token_ids(tokenizer, segments)
        output = model.generate(torch.tensor([ids]), max_new_tokens=120, do_sample=False)
        log(f"notes: {segments[1]!r}")
        log(f"reply: {tokenizer.decode(output[0, len(ids) :])!r}")


def make_vision(folder: Path, arguments: argparse.Namespace) -> None:
    """Pre-train, check and save the vision side, with a log beside the weights."""
    with logging_to(folder) as log:
        side = pretrain_vision(arguments.vision_steps, batch_size=128, lr=1e-3, seed=arguments.seed, log=log)
        save_vision(side, folder)
        check_vision(side.eval(), log)


def make_language(folder: Path, arguments: argparse.Namespace) -> None:
    """Pre-train and save the language model and its tokenizer, with a log and samples beside the weights."""
    with logging_to(folder) as log:
        torch.manual_seed(arguments.seed)
        if arguments.language_from is None:
            tokenizer = train_tokenizer(arguments.seed)
            model = LlamaForCausalLM(language_config(tokenizer))
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.language_from)
            model = LlamaForCausalLM.from_pretrained(arguments.language_from)
        options = {"steps": arguments.language_steps, "lr": arguments.language_lr, "seed": arguments.seed}
        pretrain_language(model.train(), tokenizer, batch_size=64, log=log, **options)
        save_language(model, tokenizer, folder)
        generate_samples(model.eval(), tokenizer, arguments.seed, log)


def sharpen(folder: Path, arguments: argparse.Namespace) -> None:
    """Go on with the vision side that was saved."""
    with logging_to(folder, "a") as log:
        side = load_vision(folder, arguments.seed)
        sharpen_vision(side, arguments.sharpen_steps, batch_size=128, lr=5e-4, seed=arguments.seed, log=log)
        save_vision(side, folder)
        check_vision(side.eval(), log)


def harden(folder: Path, arguments: argparse.Namespace) -> None:
    """Go on with the language model that was saved."""
    with logging_to(folder, "a") as log:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder).train()
        harden_language(
            model, tokenizer, arguments.harden_steps, batch_size=64, lr=1.5e-3, seed=arguments.seed, log=log
        )
        save_language(model, tokenizer, folder)
        generate_samples(model.eval(), tokenizer, arguments.seed, log)


@contextmanager
def logging_to(folder: Path, mode: str = "w") -> Iterator[Log]:
    """A log function that prints each line and keeps it in `folder/pretraining_log.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pretraining_log.txt").open(mode, encoding="utf-8") as file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        log(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
        yield log


PARTS = {"vision": make_vision, "sharpen": sharpen, "language": make_language, "harden": harden}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = SpellingParser(description="Make the frozen backbones of the embedded world.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for blip2/ and llama/")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--vision_steps", type=in_range(COUNT), default=3000)
    parser.add_argument("--language_steps", type=in_range(COUNT), default=4000)
    parser.add_argument(
        "--language-lr",
        type=in_range(POSITIVE, float),
        default=3e-3,
        help="highest learning rate of the language model",
    )
    parser.add_argument("--language_from", type=Path, help="folder of a language model to continue from")
    parser.add_argument("--sharpen_steps", type=in_range(COUNT), default=800)
    parser.add_argument("--harden_steps", type=in_range(COUNT), default=1500)
    parser.add_argument("--seed", type=in_range(SEED), default=0)
    parser.add_argument(
        "--threads", type=in_range(COUNT), default=1, help="threads of torch; the weights may depend on their number"
    )
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    for part, run in PARTS.items():
        if part in arguments.parts:
            run(arguments.output_dir / ("blip2" if part in ("vision", "sharpen") else "llama"), arguments)


if __name__ == "__main__":
    main()
