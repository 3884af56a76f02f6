"""What is saved loads as the model that was saved, with frozen tensors that are no longer their backbones'."""

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model, unchanged_minigpt4
from modeling_minigpt4.digest_minigpt4 import digest, digests
from processing_minigpt4 import MiniGPT4Processor


PROJECTION = {"model.language_projection.weight", "model.language_projection.bias"}
VISION_NORM = "model.vision_model.post_layernorm.weight"


@pytest.fixture(scope="module")
def tied_backbones(tmp_path_factory, write_backbones):
    return write_backbones(tmp_path_factory.mktemp("tied"), text={"tie_word_embeddings": True})


@pytest.fixture(
    params=[(True, False, False), (False, True, False), (True, True, True)],
    ids=["qformer-untied", "patches-tied", "large"],
)
def model(request, backbones, tied_backbones, monkeypatch) -> MiniGPT4ForConditionalGeneration:
    qformer, tied, large = request.param
    if large:  # as models are whose weights are not read before they are used
        monkeypatch.setattr(unchanged_minigpt4, "READ_AT_ONCE", 0)
    parts = (tied_backbones if tied else backbones).parts(qformer=qformer)
    return MiniGPT4ForConditionalGeneration.from_backbones(**parts, separator=None).eval()


def saved_names(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


@torch.no_grad()
def score(model: nn.Module, make_inputs: Callable) -> torch.Tensor:
    inputs = make_inputs(model, [[1, "image", 8, 30], [1, 7, "image", 9, 20, 21]])
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model.eval()(**inputs)[0]


@pytest.fixture
def comes_back(tmp_path: Path, make_inputs: Callable) -> Callable[..., set[str]]:
    """`comes_back(model, **options)`: save, load, compare all bits, save what was loaded and compare again."""

    def check(model, load=AutoModelForImageTextToText.from_pretrained, **options) -> set[str]:
        expected, folder = score(model, make_inputs), tmp_path / "saved"
        for name in ("saved", "again"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        model.save_pretrained(folder, **options)
        loaded = load(folder)
        loaded.save_pretrained(tmp_path / "again")
        for one in (loaded, load(tmp_path / "again")):
            tensors = one.state_dict()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
            # Kernels round by where a tensor lies in memory.
            assert_close(score(one, make_inputs), expected)
        return saved_names(folder)

    return check


# ---- digests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 16), (2, 3, 4)])
def test_every_changed_element_changes_a_digest(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).mul(50).to(dtype)
    known = int(digest(tensor))
    assert int(digest(tensor.clone())) == known
    for index in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[index] += 1
        assert int(digest(changed)) != known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.neg_(),
        lambda x: x[:, 1::2].neg_(),
        lambda x: x[:, 3::4].neg_(),
        lambda x: x[:, 1::2].mul_(2),
        lambda x: x[0, 1:4:2].neg_(),
        lambda x: x.copy_(x.flip(0)),
        lambda x: x.copy_(x.flip(1)),
        lambda x: x.__setitem__(slice(0, 2), x[[1, 0]]),
        lambda x: x.view(torch.int16)[:, ::8].bitwise_xor_(1),
    ],
)
def test_changes_of_signs_exponents_and_places_change_a_digest(change: Callable, dtype: torch.dtype) -> None:
    tensor = torch.randn(16, 48).to(dtype)
    changed = tensor.clone()
    change(changed)
    assert not torch.equal(changed, tensor) and int(digest(changed)) != int(digest(tensor))


def test_digests_of_rows_add_up() -> None:
    tensor = torch.randn(9, 10)
    parts = digest(tensor[:4]) + digest(tensor[4:], first_row=4)
    assert parts == digest(tensor) and digests({"a": tensor, "b": tensor}) == {"a": int(parts), "b": int(parts)}


# ---- unchanged ------------------------------------------------------------------------------------------------------


def test_an_unchanged_model_saves_the_projection_alone(model, comes_back) -> None:
    assert comes_back(model) == PROJECTION
    assert comes_back(copy.deepcopy(model)) == PROJECTION
    assert comes_back(pickle.loads(pickle.dumps(model))) == PROJECTION
    with torch.no_grad():
        model.model.language_projection.weight.add_(1)
    assert comes_back(model) == PROJECTION


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_is_no_change_and_an_edit_afterwards_is(model, dtype, tmp_path) -> None:
    model.to(dtype).save_pretrained(tmp_path / "cast")
    assert saved_names(tmp_path / "cast") == PROJECTION
    model.get_parameter(VISION_NORM).data[3] += 1
    model.save_pretrained(tmp_path / "edited")
    assert saved_names(tmp_path / "edited") == PROJECTION | {VISION_NORM}


def test_a_cast_model_whose_backbone_is_gone_is_saved_whole_and_told(
    tmp_path, write_backbones, caplog, make_inputs
) -> None:
    parts = write_backbones(tmp_path / "parts")
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts.parts(), separator=None)
    shutil.rmtree(parts.language_model)
    model.save_pretrained(tmp_path / "uncast")  # of which nothing has to be read
    assert saved_names(tmp_path / "uncast") == PROJECTION
    model.half()
    model.save_pretrained(tmp_path / "cast")
    assert "language_model backbone" in caplog.text and "cannot be read" in caplog.text and "full=True" in caplog.text
    assert {n for n in model.state_dict() if "language_model." in n or "lm_head" in n} | PROJECTION == saved_names(
        tmp_path / "cast"
    )


# ---- changed --------------------------------------------------------------------------------------------------------


def edit_one_element(model) -> None:
    model.get_parameter(VISION_NORM).data[0] += 1


def edit_without_gradient(model) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 0] += 1


def edit_the_head(model) -> None:
    model.lm_head.weight.data[7].mul_(3)


def replace_a_parameter(model) -> None:
    norm = model.model.vision_model.post_layernorm
    norm.weight = nn.Parameter(norm.weight.detach() * 2, requires_grad=False)


def load_averages(model) -> None:
    model.load_state_dict({name: tensor * 1.05 for name, tensor in model.state_dict().items()})


def assign_averages(model) -> None:
    model.load_state_dict({name: tensor * 1.05 for name, tensor in model.state_dict().items()}, assign=True)


def train_and_freeze(model) -> None:
    part = "vision" if model.model.qformer is None else "qformer"
    model.freeze_backbones(train=[part])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.1)
    model.freeze_backbones()


def merge_adapter(model) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    assert peft.get_peft_model(model, config).merge_and_unload() is model


def grow(model) -> None:
    model.resize_token_embeddings(310)


def shrink(model) -> None:
    model.resize_token_embeddings(290)


def pad_vocabulary(model) -> None:
    model.resize_token_embeddings(301, pad_to_multiple_of=64)


CHANGES = [
    edit_one_element, edit_without_gradient, edit_the_head, replace_a_parameter, load_averages, assign_averages,
    train_and_freeze, merge_adapter, grow, shrink, pad_vocabulary,
]  # fmt: skip


@pytest.mark.parametrize("full", [False, True], ids=["beside", "full"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_comes_back(change: Callable, full: bool, model, comes_back) -> None:
    change(model)
    names = comes_back(model, full=full)
    assert names > PROJECTION


def test_what_came_with_a_checkpoint_stays_in_it(model, comes_back, tmp_path) -> None:
    original = model.get_parameter(VISION_NORM).detach().clone()
    edit_one_element(model)
    model.save_pretrained(tmp_path / "edited")
    loaded = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "edited")
    loaded.get_parameter(VISION_NORM).data.copy_(original)  # back to the backbone's
    assert comes_back(loaded) == PROJECTION | {VISION_NORM}


def test_several_files_hold_it_too(model, comes_back) -> None:
    merge_adapter(model)
    assert len(comes_back(model, max_shard_size="5KB")) > 4


def test_how_much_is_written_is_told(backbones, tmp_path, caplog) -> None:
    model = MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts())
    edit_one_element(model)
    model.save_pretrained(tmp_path / "little")
    assert "1 tensors of the vision backbone (0.0 of 0.1 MB)" in caplog.text and "is most of it" not in caplog.text
    load_averages(model)
    model.save_pretrained(tmp_path / "much")
    assert "of the language_model backbone" in caplog.text and "is most of it: `full=True`" in caplog.text


def test_tensors_that_are_given_count_and_not_the_models_own(model, tmp_path) -> None:
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given[VISION_NORM] += 1
    model.save_pretrained(tmp_path / "given", state_dict=dict(given))
    assert torch.equal(load_file(tmp_path / "given" / "model.safetensors")[VISION_NORM], given[VISION_NORM])
    edit_one_element(model)
    with pytest.raises(ValueError, match=r"post_layernorm.weight is no longer what its backbone provides but is not"):
        model.save_pretrained(tmp_path / "lost", state_dict={name: given[name] for name in PROJECTION})
    assert not (tmp_path / "lost").exists()


def test_the_model_without_a_head_comes_back(model, comes_back, tmp_path) -> None:
    model.save_pretrained(tmp_path / "whole")
    base = MiniGPT4Model.from_pretrained(tmp_path / "whole")
    load = MiniGPT4Model.from_pretrained
    assert comes_back(base, load=load) == {name.removeprefix("model.") for name in PROJECTION}
    base.vision_model.post_layernorm.weight.data += 1
    base.resize_token_embeddings(310)
    assert len(comes_back(base, load=load)) == 4


# ---- refused --------------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_merged_and_still_there_is_refused(model, tmp_path, comes_back) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="`save_pretrained` of the PeftModel"):
        model.save_pretrained(tmp_path / "wrapped")
    wrapped.merge_adapter()
    for full in (False, True):
        with pytest.raises(ValueError, match="count twice"):
            model.save_pretrained(tmp_path / "merged", full=full)
    assert not (tmp_path / "merged").exists()
    assert len(comes_back(wrapped.merge_and_unload())) == 4


def test_a_head_that_is_tied_no_longer_is_refused_until_the_configuration_says_so(
    tied_backbones, tmp_path, comes_back
) -> None:
    model = MiniGPT4ForConditionalGeneration.from_backbones(**tied_backbones.parts(), separator=None)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2, requires_grad=False)
    for full in (False, True):
        with pytest.raises(ValueError, match="tie_word_embeddings"):
            model.save_pretrained(tmp_path / "untied", full=full)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    assert comes_back(model) == PROJECTION | {"lm_head.weight"}


# ---- added tokens ---------------------------------------------------------------------------------------------------


def test_added_tokens_are_never_taken_for_pictures(backbones, tmp_path, picture, tokenizer) -> None:
    model = MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts(), separator=None).eval()
    processor = MiniGPT4Processor.from_backbones(backbones.vision, backbones.language_model, model.config)
    processor.tokenizer.add_tokens(["<new>", "<newer>"])
    inputs = {"text": "<image> of <new> and <newer>", "images": picture(), "return_tensors": "pt"}
    for _ in range(2):  # before and after the model has learned of them
        with pytest.raises(ValueError, match=r"'<new>' has the id 300.*`processor.image_token_id = model.config"):
            processor(**inputs)
        model.resize_token_embeddings(len(processor.tokenizer))
    processor.image_token_id = model.config.image_token_id
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    batch = MiniGPT4Processor.from_pretrained(tmp_path)(**inputs)
    assert {300, 301} < set(batch["input_ids"][0].tolist())
    with torch.no_grad():
        assert_close(again(**batch).logits, model(**batch).logits)


def test_a_resized_model_says_what_its_processor_needs(backbones, picture) -> None:
    model = MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts(), separator=None).eval()
    processor = MiniGPT4Processor.from_backbones(backbones.vision, backbones.language_model, model.config)
    model.resize_token_embeddings(301, pad_to_multiple_of=64)
    batch = processor(text="<image> here", images=picture(), return_tensors="pt")
    with pytest.raises(ValueError, match=r"`processor.image_token_id = 320`"):
        model(**batch)
