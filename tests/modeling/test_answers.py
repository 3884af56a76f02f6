"""Scoring answers only: the same numbers as with all logits, for every decoder, head and dtype."""

import copy

import pytest
import torch
from closeness import assert_close
from torch import nn
from transformers import LlamaConfig

from modeling_minigpt4.heads_minigpt4 import adjust_logits, score_answers


# ---- scores ---------------------------------------------------------------------------------------------------------

ADJUSTMENTS = {
    "plain": {}, "scaled": {"logit_scale": 0.5}, "divided": {"logits_scaling": 3.0},
    "capped": {"final_logit_softcapping": 2.0},
}  # fmt: skip


def score(hidden: torch.Tensor, answers: torch.Tensor, head: nn.Module, config, weights: torch.Tensor):
    """Scores as `score_answers` gives them, and the gradient of their weighted sum."""
    hidden = hidden.clone().requires_grad_()
    found = score_answers(hidden, answers, head, config)
    (found[0] * weights).sum().backward()
    return [*(each.detach() for each in found), hidden.grad]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_a_frozen_head_gives_the_scores_and_gradients_of_one_that_trains(
    name: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=30, **ADJUSTMENTS[name])
    head = nn.Linear(8, 30, bias=bias)
    hidden, answers, weights = torch.randn(11, 8), torch.randint(0, 30, (11,)), torch.rand(11)
    whole = score(hidden, answers, head, config, weights)
    frozen = copy.deepcopy(head).requires_grad_(False)
    reference = adjust_logits(head(hidden), config).log_softmax(-1)
    assert_close(whole[0], reference[range(11), answers].detach())
    for at_once, in_cache in ((1 << 26, 1 << 19), (30 * 4, 30 * 3), (1, 1)):
        monkeypatch.setattr("modeling_minigpt4.heads_minigpt4._AT_ONCE", at_once)
        monkeypatch.setattr("modeling_minigpt4.heads_minigpt4._IN_CACHE", in_cache)
        log_probs, entropy, is_top1, gradient = score(hidden, answers, frozen, config, weights)
        assert_close(log_probs, whole[0])
        assert_close(entropy, whole[1])
        assert torch.equal(is_top1, whole[2])
        assert_close(gradient, whole[3])


def test_small_gradients_survive_float16() -> None:
    """Where a token is almost certain, float16 would round the gradients of the others to nothing."""
    config, head = LlamaConfig(vocab_size=4), nn.Linear(4, 4, bias=False).requires_grad_(False)
    head.weight.data = torch.eye(4)
    hidden, answers = torch.tensor([[18.0, 0, 0, 0]]), torch.tensor([0])
    exact = score(hidden, answers, head, config, torch.ones(1))[-1]
    assert torch.all((exact[0, 1:] < 0) & (exact[0, 1:] > -(2**-25)))
    scale = 2.0**16  # of the loss, as mixed precision has it
    half = score(hidden.half(), answers, head.half(), config, scale * torch.ones(1))[-1]
    assert_close(half[0, 1:].float() / scale, exact[0, 1:], share=0.1)  # what float16 can tell


def test_no_answers_have_a_gradient_of_nought() -> None:
    head = nn.Linear(8, 30).requires_grad_(False)
    hidden = torch.randn(0, 8).requires_grad_()
    log_probs, entropy, is_top1 = score_answers(
        hidden, torch.zeros(0, dtype=torch.long), head, LlamaConfig(vocab_size=30)
    )
    log_probs.sum().backward()
    assert log_probs.shape == entropy.shape == is_top1.shape == (0,)
    assert hidden.grad.shape == (0, 8)


def test_without_gradients_none_is_computed() -> None:
    head = nn.Linear(8, 30).requires_grad_(False)
    with torch.no_grad():
        log_probs, *_ = score_answers(torch.randn(3, 8), torch.tensor([1, 2, 3]), head, LlamaConfig(vocab_size=30))
    assert log_probs.shape == (3,) and not log_probs.requires_grad


# ---- the whole model ------------------------------------------------------------------------------------------------

ROWS = [[1, "image", 8, 30, 31], [1, "image", 5, "image", 3, 9, 20, 21]]


@pytest.mark.parametrize("qformer", [True, False])
def test_answers_are_scored_as_with_all_logits(qformer: bool, make_model, make_inputs) -> None:
    model = make_model(qformer=qformer).train()
    model.freeze_backbones()
    inputs = make_inputs(model, ROWS)
    positions = torch.tensor([inputs["input_ids"].shape[1] - 2, 2 * inputs["input_ids"].shape[1] - 3])
    answers = torch.tensor([7, 9])
    log_probs = model(**inputs).logits.flatten(0, 1).log_softmax(-1)
    output = model(**inputs, answers=answers, answer_positions=positions)
    assert output.logits is None and output.loss is None
    assert_close(output.log_probs, log_probs[positions, answers])
    gradients = []
    for value in (output.log_probs.sum(), log_probs[positions, answers].sum()):
        model.zero_grad()
        value.backward()
        gradients.append(model.model.language_projection.weight.grad.clone())
    assert_close(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_logits_are_those_of_all(keep: int, make_model, make_inputs) -> None:
    model = make_model()
    inputs = make_inputs(model, ROWS)
    whole = model(**inputs).logits
    assert_close(model(**inputs, logits_to_keep=keep).logits, whole[:, -keep:])
    places = torch.tensor([0, whole.shape[1] - keep])
    assert_close(model(**inputs, logits_to_keep=places).logits, whole[:, places])


@pytest.mark.parametrize("given", [{"answers": [1]}, {"answer_positions": [1]}, {"labels": True}])
def test_answers_need_their_places_and_no_labels(given: dict, make_model, make_inputs) -> None:
    model = make_model()
    inputs = make_inputs(model, ROWS)
    if "labels" in given:
        given = {"answers": [1], "answer_positions": [1]} | {"labels": inputs["input_ids"]}
    with pytest.raises(ValueError, match="`answers` and `answer_positions` together"):
        model(**inputs, **{name: torch.as_tensor(value) for name, value in given.items()})


@torch.no_grad()
def test_places_of_pictures_may_be_told(make_model, make_inputs) -> None:
    model = make_model()
    inputs = make_inputs(model, ROWS)
    places = (inputs["input_ids"] == model.config.image_token_id).flatten().nonzero().squeeze(-1)
    assert torch.equal(model(**inputs, image_positions=places).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**inputs, image_positions=places[:-1])
