"""The recipes themselves on a node of eight GPUs, in their own layout, with small models.

On the CPU the same body runs on two ranks: tests/e2e/test_recipes.py.
"""

from pathlib import Path

import pytest

from ..e2e.test_recipes import RECIPES, SHRUNK, train_shrunk
from .conftest import Where


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_in_its_own_layout(name: str, cuda: Where, tmp_path: Path) -> None:
    """Proves each recipe's parallelism of student, teacher and engine together on one node, its flags of Megatron's,
    offloading where it has it, and a checkpoint at the end; four nodes of the 70B's become one."""
    cuda.need(8)
    sizes = SHRUNK | {"num_attention_heads": 8, "num_key_value_heads": 8, "num_experts": 8}
    train_shrunk(name, {"parallel.ranks": 8}, sizes, cuda.gap, tmp_path)
