"""Weights of one role share their kind, and no two of one layer do."""

from __future__ import annotations

import pytest

from fp4compile.names import kinds, layer_of

LLAMA = [f"model.layers.{i}.{m}.weight" for i in (0, 11) for m in ("self_attn.q_proj", "mlp.up")]
BERT = [
    f"bert.encoder.layer.{i}.{place}.weight"
    for i in (0, 1)
    for place in ("attention.self.query", "attention.output.dense", "output.dense")
]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (LLAMA, ["q_proj", "up", "q_proj", "up"]),
        (BERT, 2 * ["attention.self.query", "attention.output.dense", "output.dense"]),
        (["model.embed_tokens.weight", "lm_head.weight"], ["embed_tokens", "lm_head"]),
        (["0.weight", "2.weight"], ["0", "2"]),
        (["kn", "nk"], ["kn", "nk"]),
    ],
    ids=["llama", "bert", "no layers", "sequential", "parameters"],
)
def test_kinds(names: list[str], expected: list[str]) -> None:
    assert list(kinds(names).values()) == expected


def test_of_nothing_there_are_no_kinds() -> None:
    assert kinds([]) == {}


@pytest.mark.parametrize(
    ("name", "layer"), [(LLAMA[2], 11), ("0.weight", 0), ("lm_head.weight", None), ("w2.x", None)]
)
def test_the_layer_is_the_first_number(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer
