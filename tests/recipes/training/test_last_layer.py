"""The last layer of a decoder in training: only what is scored is computed, and no other thread notices."""

import threading

import pytest
import torch
from closeness import assert_close
from transformers import AutoConfig, AutoModel

from recipes_minigpt4.training.last_layer import LastLayer


DECODERS = {
    "llama": {}, "qwen3": {"head_dim": 8}, "gemma2": {"head_dim": 8}, "phi": {}, "opt": {"ffn_dim": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2}, "falcon": {}, "gpt_neox": {}, "mixtral": {}, "bloom": {},
}  # fmt: skip
HANDS_ON = {"llama", "qwen3", "gemma2", "phi", "mixtral"}  # decoders whose layers see every argument of the call


def make_decoder(name: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
             "intermediate_size": 32, "vocab_size": 50, "pad_token_id": 0}  # fmt: skip
    return AutoModel.from_config(AutoConfig.for_model(name, **{**sizes, **DECODERS[name]})).eval()


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_scored_is_the_same_for_every_decoder(name: str) -> None:
    decoder, ids, positions = make_decoder(name), torch.randint(1, 50, (3, 7)), torch.tensor([4, 5, 11, 13, 20])
    whole = decoder(input_ids=ids).last_hidden_state.flatten(0, 1)
    told = {"answer_positions": positions} if name in HANDS_ON else {}
    with LastLayer(decoder):
        scored = decoder(input_ids=ids, **told).last_hidden_state.flatten(0, 1)
        others = decoder(input_ids=ids).last_hidden_state.flatten(0, 1)
    assert_close(scored[positions], whole[positions])
    assert torch.equal(scored, whole) == (not told)
    assert torch.equal(others, whole)  # calls that do not say what is scored
    assert torch.equal(decoder(input_ids=ids).last_hidden_state.flatten(0, 1), whole)  # all is as it was
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_checkpointed_layer_leaves_the_same_out_when_it_runs_again(reentrant: bool | None) -> None:
    decoder, positions, seen, gradients = make_decoder().train(), torch.tensor([3, 8]), [], []
    decoder.layers[-1].mlp.gate_proj.register_forward_pre_hook(lambda module, args: seen.append(len(args[0][0])))
    for checkpointing in (False, True) if reentrant is not None else (False,):
        if checkpointing:
            decoder.gradient_checkpointing_enable({"use_reentrant": reentrant})
        embeddings = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with LastLayer(decoder):
            output = decoder(inputs_embeds=embeddings, answer_positions=positions).last_hidden_state
            thread = threading.Thread(target=output.flatten(0, 1)[positions].sum().backward)  # as GPUs have it
            thread.start()
            thread.join()
        gradients.append(embeddings.grad)
    assert_close(gradients[0], gradients[-1])
    assert seen == [2] * (1 if reentrant is None else 3)  # checkpointing runs it twice


def test_other_threads_see_the_whole_layer() -> None:
    decoder, ids, positions = make_decoder(), torch.randint(1, 50, (3, 7)), torch.tensor([4, 20])
    whole, found = decoder(input_ids=ids).last_hidden_state, []

    def reply() -> None:
        found.extend(torch.equal(decoder(input_ids=ids).last_hidden_state, whole) for _ in range(30))

    with LastLayer(decoder):
        threads = [threading.Thread(target=reply) for _ in range(2)]
        [thread.start() for thread in threads]
        scored = [decoder(input_ids=ids, answer_positions=positions).last_hidden_state for _ in range(60)]
        [thread.join() for thread in threads]
    assert found == [True] * 60
    assert all(torch.equal(one, scored[0]) and not torch.equal(one, whole) for one in scored)
