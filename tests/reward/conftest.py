"""Tiny reward models: seeds of one architecture."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def seeded_reward_model(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """The tiny model in float32 with a random scalar head and layers of a seed; a folder for each seed."""

    @functools.cache
    def make(seed: int) -> Path:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny_model, num_labels=1, dtype=torch.float32
        )
        torch.nn.init.normal_(model.score.weight, std=1.0)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight += 0.02 * torch.randn_like(layer.mlp.down_proj.weight)
        out = tmp_path_factory.mktemp(f"rm{seed}")
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(out)
        return out

    return make
