"""A small vision transformer trained on scikit-learn's digits, then quantized: top-1 accuracy."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fp4compile
from bench.configurations import CONFIGURATIONS
from fp4compile.errors import MissingDependencyError

EPOCHS, BATCH, LEARNING_RATE = 40, 64, 2e-3
# One image in so many is not trained on but tested.
TEST_STRIDE = 4
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class DigitsResult:
    """``accuracy`` in percent of ``images`` that were neither trained on nor calibrated with."""

    name: str
    accuracy: float
    images: int
    bits_per_weight: float
    seconds: float
    threads: int


@dataclass(frozen=True)
class Digits:
    """Images ``[n, 1, 8, 8]`` in [-1, 1] and their labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits() -> Digits:
    """The 1797 images of scikit-learn's digits."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingDependencyError(
            "this benchmark reads the digits of scikit-learn, which is not installed; run: "
            "pip install scikit-learn"
        ) from error
    found = load()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(found.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % TEST_STRIDE == 0
    return Digits((images[~test], labels[~test]), (images[test], labels[test]))


def train(digits: Digits, epochs: int = EPOCHS, seed: int = 0) -> nn.Module:
    """A ViT of 4 layers and 64 channels on patches of 2 x 2 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    images, labels = digits.train
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = nn.functional.cross_entropy(model(images[batch]).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def run(names: Sequence[str], threads: int) -> Iterator[DigitsResult]:
    """Train once; a result per configuration."""
    torch.set_num_threads(threads)
    digits = load_digits()
    model = train(digits)
    for name in names:
        yield measure(name, copy.deepcopy(model), digits)


def measure(name: str, model: nn.Module, digits: Digits) -> DigitsResult:
    """Quantize ``model`` and test it."""
    configuration = CONFIGURATIONS[name]
    start, bits = time.perf_counter(), 32.0
    if configuration is not None:
        spec, method, attention = configuration
        images = digits.train[0][:CALIBRATION_IMAGES]
        batches = [{"pixel_values": part} for part in images.split(BATCH)]
        options: Any = {"method": method, "attention": attention, "progress": False}
        fp4compile.quantize(model, batches, spec, **options)
        report: Any = model.fp4_report
        bits = report.bits_per_weight
    seconds = time.perf_counter() - start
    images, labels = digits.test
    with torch.no_grad():
        right = model(images).logits.argmax(dim=-1) == labels
    accuracy = 100 * float(right.double().mean())
    return DigitsResult(name, accuracy, len(labels), bits, seconds, torch.get_num_threads())
