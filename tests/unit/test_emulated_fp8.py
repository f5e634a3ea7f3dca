"""Casting to E4M3 and back, and what the measure of its noise says."""

import pytest
import torch

from megatron_sgopd.precision.emulation import BLOCK, cast_per_block, cast_per_tensor, emulated_fp8
from megatron_sgopd.precision.noise_floor import errors, flips


def test_numbers_that_e4m3_has_stay_and_others_move_by_a_sixteenth_at_most() -> None:
    exact = torch.tensor([448.0, -2.0, 0.0, 1.75, 0.0625])
    assert torch.equal(cast_per_tensor(exact), exact)
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    normal = values.abs() > values.abs().max() / 448 * 2**-6  # smaller ones are subnormal
    assert ((cast_per_tensor(values) - values).abs() / values.abs())[normal].max() <= 2**-4
    assert (cast_per_tensor(values) != values).float().mean() > 0.9


def test_a_block_has_a_scale_of_its_own() -> None:
    # 448 makes everything in its tensor coarse, and in blocks only what is beside it.
    values = torch.full((BLOCK + 3, 2 * BLOCK + 5), 1e-4)
    values[0, 0] = 448.0
    assert torch.equal(cast_per_tensor(values)[0, 1:], torch.zeros(2 * BLOCK + 4))
    blocks = cast_per_block(values, BLOCK)
    assert blocks.shape == values.shape and blocks[0, 0] == 448.0
    torch.testing.assert_close(blocks[:, BLOCK:], values[:, BLOCK:], rtol=2**-4, atol=0)
    torch.testing.assert_close(blocks[BLOCK:], values[BLOCK:], rtol=2**-4, atol=0)
    assert bool((blocks[1:BLOCK, :BLOCK] == 0).all())
    rows = cast_per_block(values, 1)
    torch.testing.assert_close(rows[1:], values[1:], rtol=2**-4, atol=0)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("first_last", [False, True])
def test_a_model_is_what_it_was_afterwards(recipe: str, first_last: bool) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=50)).eval()
    tokens = torch.arange(20)[None]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        exact = model(tokens).logits
        with emulated_fp8(model, recipe, first_last):
            moved = model(tokens).logits
            head = model.lm_head.weight.clone()
        assert torch.equal(model(tokens).logits, exact)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(head, before["lm_head.weight"]), "the output layer is left out"
    assert 0 < (moved - exact).abs().max() < 0.5


def test_flips_are_counted_plainly_by_weight_and_above_the_threshold() -> None:
    exact = torch.tensor([1.0, -1.0, 0.1, -0.1])
    moved = torch.tensor([1.0, -1.0, -0.2, 0.05])
    found = flips(exact, moved, tau=0.1)
    assert found["flipped"] == 0.5
    assert found["flipped_weighted"] == pytest.approx(0.2 / 2.2)
    assert found["flipped_above_tau"] == pytest.approx(1 / 3)
    assert found["neutral"] == 0.25


def test_the_threshold_covers_nineteen_of_twenty() -> None:
    error = torch.arange(1001) / 1000
    found = errors(torch.zeros(1001), error)
    assert found["tau"] == pytest.approx(0.95) and found["mean"] == pytest.approx(0.5)
    assert (error <= found["tau"]).float().mean() == pytest.approx(0.95, abs=1e-3)
