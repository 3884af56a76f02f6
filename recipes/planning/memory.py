"""Memory of a training step, found by taking the step with tensors that have a shape and no data.

torch's fake tensors run the model's own code, forward and backward, in seconds and without memory. What is counted is
the storage of every tensor that an operation makes, from then until nothing refers to it: what autograd keeps for the
backward pass, what checkpointing keeps instead, and what is there for a moment only. So nothing is said here about
attention or norms: whatever model is composed, its own operations say it.

What operations need inside themselves (workspaces of cuBLAS, blocks that an allocator rounds up) is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import masking_utils

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from recipes_minigpt4.data.collator import to_pixels
from recipes_minigpt4.training.last_layer import LastLayer
from recipes_minigpt4.training.loss import score_batch
from recipes_minigpt4.utils.errors import one_line


# What a tensor is there for. Those of the first three stay from step to step.
WEIGHTS, OPTIMIZER, GRADIENTS = "weights", "optimizer", "gradients"
BATCH, VISION, ACTIVATIONS, LOGITS = "batch", "vision side", "activations", "logits"


@dataclass(frozen=True)
class Step:
    """
    What one process does in a step.

    Args:
        rows: rows of a batch.
        length: tokens of a row, image tokens among them.
        answer: tokens of a row that carry loss.
        accumulation: batches of a step.
        autocast: dtype of mixed precision, or None.
        checkpointing: keywords of gradient checkpointing, or None.
        features: dtype of stored features that are trained from, or None for pixels.
        gpu: whether the step runs on a GPU rather than a CPU.
        whole_rows: whether every token is scored, as in the steps that are left to TRL, rather than answers alone.
    """

    rows: int
    length: int
    answer: int
    accumulation: int = 1
    autocast: torch.dtype | None = None
    checkpointing: Mapping[str, Any] | None = None
    features: torch.dtype | None = None
    gpu: bool = True
    whole_rows: bool = False


@dataclass
class Trace:
    """
    Bytes of a step, by kind.

    Args:
        passes: when there are most of them during forward and backward passes.
        update: when there are most of them while the optimizer works.
        most: the most of every kind by itself, whenever that is.
        failure: why the passes could not be followed, or nothing.
    """

    passes: Counter[str] = field(default_factory=Counter)
    update: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    failure: str = ""


# ---- counting -------------------------------------------------------------------------------------------------------


class StorageWatch(TorchDispatchMode):
    """
    Counts the bytes of storages that operations make, while they live, by what they are there for.

    Args:
        vocab_size: what tells logits from other tensors.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.kind = WEIGHTS  # of what is made next
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._kinds: dict[int, str] = {}  # of living storages, by their id
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                is_logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size
                self.add(tensor, LOGITS if is_logits and self.kind == ACTIVATIONS else self.kind)
        return result

    def add(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor's storage from now on, if it is not counted already."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._kinds:
            return
        size = storage.nbytes()
        self._kinds[key] = kind
        self._watched[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self._count(kind, size)

    def move(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor that is there already as something else."""
        key, size = id(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
        if key in self._kinds:
            self.now[self._kinds[key]] -= size
            self._kinds[key] = kind
            self._count(kind, size)

    def _gone(self, key: int, size: int) -> None:
        self.now[self._kinds.pop(key)] -= size
        del self._watched[key]

    def _count(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self.most[kind] = max(self.most[kind], self.now[kind])
        if self.now.total() > self.peak.total():
            self.peak = Counter(self.now)

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """Count what is made inside as `kind`."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def restart(self) -> Counter[str]:
        """What there was at the peak so far; from here on the peak is looked for anew."""
        peak, self.peak = self.peak, Counter(self.now)
        return peak


# What autocast computes in float32 on a GPU and not on a CPU, of what models are made of (torch, "Automatic Mixed
# Precision package", CUDA ops that autocast to float32).
_FLOAT32_ON_GPU = {
    "layer_norm", "group_norm", "softmax", "log_softmax", "pow", "__pow__", "exp", "log", "rsqrt", "reciprocal",
    "softplus", "norm", "sum", "cumsum", "prod",
}  # fmt: skip


class AutocastOfGPU(TorchFunctionMode):
    """Lets autocast of the CPU, where the fake tensors are, choose dtypes as on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FLOAT32_ON_GPU and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, _in_float32, (args, kwargs))
        return func(*args, **kwargs)


def _in_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def needs_values(make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> str:
    """Why an optimizer cannot step without data, or nothing."""
    try:
        with FakeTensorMode():
            parameter = nn.Parameter(torch.empty(2, 2))
            parameter.grad = torch.empty(2, 2)
            make_optimizer([parameter]).step()
    except Exception as error:  # whatever it says
        return one_line(error)
    return ""


# ---- the step -------------------------------------------------------------------------------------------------------


def trace_step(
    model: MiniGPT4ForConditionalGeneration,
    step: Step,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> Trace:
    """
    Take a training step with fake tensors and count their bytes.

    The step is the second one or a later one: the optimizer has its state.

    Args:
        model: on the meta device, with parameters in the dtypes that they are trained in; it becomes a fake one.
        step: its sizes and settings.
        make_optimizer: makes the optimizer of the parameters that train.
    """
    watch = StorageWatch(model.config.text_config.vocab_size)
    tokens = (
        model.config.num_image_tokens
    )  # which may ask an encoder on the meta device, and so not among fake tensors
    with ExitStack() as modes:
        modes.enter_context(FakeTensorMode())
        _materialize(model)
        modes.enter_context(watch)
        if step.gpu and step.autocast is not None:
            modes.enter_context(AutocastOfGPU())
        for tensor in (*model.parameters(), *model.buffers()):
            watch.add(tensor, WEIGHTS)
        for module in (model.model.vision_model, model.model.qformer):
            if module is not None:
                _count_inside(watch, module)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(trained)
        _make_state(watch, optimizer, trained)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda parameter: watch.move(parameter.grad, GRADIENTS))
        with watch.counting(BATCH):
            batches = [_batch(model, step, tokens) for _ in range(step.accumulation)]
        watch.restart()
        watch.most = Counter(watch.now)
        _prepare_model(model, step)
        try:
            with watch.counting(ACTIVATIONS), _rows_are_not_packed(), LastLayer(model.language_model):
                for batch in batches[:2]:  # gradients are there from the second on; the others are like it
                    _forward_and_backward(model, batch, step, watch)
        except Exception as error:  # whatever operations say that need values, such as the routers of some experts
            known = Counter({kind: watch.now[kind] for kind in (WEIGHTS, OPTIMIZER, BATCH)})
            return Trace(known, known, known, failure=one_line(error))
        passes = watch.restart()
        with watch.counting(OPTIMIZER):
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        return Trace(passes, watch.restart(), watch.most)


@dataclass(frozen=True)
class Encoding:
    """
    What encoding a batch for the cache of features takes.

    Args:
        peak: bytes by kind when there are most of them.
        flops: operations of a picture: matrix products, convolutions and attention.
        shape: of a picture's features, (image tokens, channels).
    """

    peak: Counter[str]
    flops: int
    shape: tuple[int, ...]


def trace_encoding(model: MiniGPT4ForConditionalGeneration, step: Step) -> Encoding:
    """
    Encode a batch with fake tensors, as the cache of features is filled, and count bytes and operations.

    Args:
        model: on the meta device; it becomes a fake one, of which nothing trains.
        step: its sizes and settings.
    """
    model.requires_grad_(False)  # torch's counter of operations would look for graphs
    watch = StorageWatch(model.config.text_config.vocab_size)
    flops = FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _attention_flops})
    with ExitStack() as modes:
        modes.enter_context(FakeTensorMode())
        _materialize(model)
        for mode in (flops, watch, torch.no_grad()):
            modes.enter_context(mode)  # type: ignore[arg-type]
        if step.autocast is not None:
            modes.enter_context(torch.autocast("cpu", step.autocast))
            if step.gpu:
                modes.enter_context(AutocastOfGPU())
        for tensor in (*model.parameters(), *model.buffers()):
            watch.add(tensor, WEIGHTS)
        with watch.counting(BATCH):
            pixels = torch.empty(step.rows, 3, *model.config.image_size)
        with watch.counting(VISION):
            features = model.model.encode_images(pixels).last_hidden_state
    return Encoding(watch.peak, int(flops.get_total_flops()) // step.rows, tuple(features.shape[1:]))


# Has no formula in torch.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _materialize(model: nn.Module) -> None:
    """Put fake tensors in the place of those on the meta device, in place; shared ones stay shared."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = made[tensor]  # type: ignore[assignment]


def _count_inside(watch: StorageWatch, module: nn.Module) -> None:
    """Count what a part of the vision side makes in its forward pass as its own."""

    def enter(*_: Any) -> None:
        watch.kind = VISION

    def leave(*_: Any) -> None:
        watch.kind = ACTIVATIONS

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _make_state(watch: StorageWatch, optimizer: torch.optim.Optimizer, trained: Iterable[nn.Parameter]) -> None:
    """Let the optimizer make its state, as it does in the first step of a run."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    with watch.counting(OPTIMIZER):
        optimizer.step()
    optimizer.zero_grad()


@contextmanager
def _rows_are_not_packed() -> Iterator[None]:
    """Keep transformers from looking for rows of several sequences: positions have no values here."""
    name = "find_packed_sequence_indices"
    looks = getattr(masking_utils, name)
    setattr(masking_utils, name, lambda positions: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, looks)


def _batch(model: MiniGPT4ForConditionalGeneration, step: Step, tokens: int) -> dict[str, torch.Tensor]:
    """What `StageCollator` makes of rows that are all of the full length, with so many tokens of a picture."""
    batch = {
        name: torch.empty(step.rows, step.length, dtype=torch.long)
        for name in ("input_ids", "attention_mask", "labels")
    }
    batch["image_positions"] = torch.empty(step.rows * tokens, dtype=torch.long)
    batch["label_positions"] = torch.empty(step.rows * step.answer, dtype=torch.long)
    if step.features is None:
        batch["pixel_values"] = torch.empty(step.rows, 3, *model.config.image_size, dtype=torch.uint8)
    else:
        channels = next(model.model.language_projection.parameters()).shape[1]
        batch["vision_features"] = torch.empty(step.rows, tokens, channels, dtype=step.features)
    return batch


def _prepare_model(model: MiniGPT4ForConditionalGeneration, step: Step) -> None:
    """Checkpointing as the Trainer switches it on, under its name of either release."""
    if step.checkpointing is not None:
        # TRL's choice where nothing is said; that of transformers 4.57 would be the other.
        options = {"use_reentrant": False, **step.checkpointing}
        every = {name: options.pop(name) for name in ("every_n_layers",) if name in options}
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({name: value for name, value in options.items() if name not in ("offload", "selective")}, **every)
    model.train()


def _forward_and_backward(
    model: MiniGPT4ForConditionalGeneration, batch: Mapping[str, torch.Tensor], step: Step, watch: StorageWatch
) -> None:
    """A batch as `MiniGPT4Trainer.training_step` takes it: what is named here lives as long as there."""
    loss = _loss(model, batch, step, watch)
    # What `loss.backward()` comes to; modes see that call, and are off in what it does.
    Variable._execution_engine.run_backward(  # type: ignore[attr-defined]
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _loss(
    model: MiniGPT4ForConditionalGeneration, batch: Mapping[str, torch.Tensor], step: Step, watch: StorageWatch
) -> torch.Tensor:
    inputs = dict(batch)
    if step.features is None:
        with watch.counting(VISION):
            inputs["pixel_values"] = to_pixels(inputs["pixel_values"], torch.empty(3, 256))
    precision: AbstractContextManager[Any] = nullcontext()
    if step.autocast is not None:
        precision = torch.autocast("cpu", step.autocast)
    with precision:
        if step.whole_rows:
            # Rows of the same length need no mask, as transformers finds out by their values.
            for name in ("label_positions", "attention_mask"):
                del inputs[name]
            return model(**inputs, use_cache=False).loss
        log_probs = score_batch(model, inputs, is_causal=True).log_probs
    return -log_probs.sum() / len(log_probs)
