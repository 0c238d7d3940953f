"""bitsandbytes' FP4 weights become ours where that is exact, and others say why they do not.

The tensors are laid out as bitsandbytes 0.50 saves them.
"""

from __future__ import annotations

import json
import logging
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_llama, tokens
from safetensors.torch import save_file
from torch import Tensor, nn

import fp4compile
from fp4compile.errors import InterchangeError
from fp4compile.integrations import bitsandbytes
from fp4compile.integrations.foreign import FOREIGN, foreign_weight
from fp4compile.integrations.serialize import fp4_parameters

# bitsandbytes.functional.get_4bit_type("fp4")
HALF = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
VALUES = torch.cat((HALF, -HALF))
SMALLEST = (1, 9)
SIZE = 64


def stored(codes: Tensor, maxima: Tensor, size: int = SIZE, **nested: Any) -> dict[str, Tensor]:
    """What ``QuantState.as_dict(packed=True)`` and the codes are, of ``codes`` ``[N, K]``."""
    flat = codes.flatten().view(-1, 2)
    about = {"quant_type": "fp4", "blocksize": size, "dtype": "bfloat16", "shape": [*codes.shape]}
    tensors = {"packed": (flat[:, :1] << 4 | flat[:, 1:]), "absmax": maxima, "quant_map": VALUES}
    if nested:
        about |= {
            "nested_blocksize": 2,
            "nested_dtype": "float32",
            "nested_offset": nested["offset"],
        }
        tensors |= {"nested_absmax": nested["absmax"], "nested_quant_map": nested["quant_map"]}
    return tensors | {"state": torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)}


def named(weight: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` of the weight ``weight`` by their names in a checkpoint."""
    plain = {part: pattern.replace("\\", "")[:-1] for pattern, part in bitsandbytes.TENSORS.items()}
    module = weight.removesuffix(".weight")
    return {module + plain[part]: tensor.clone() for part, tensor in tensors.items()}


def save(folder: Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    model.config.quantization_config = config
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def random_codes(N: int, K: int, *, seed: int = 0) -> Tensor:
    """All codes that E2M1 has, too."""
    drawn = torch.Generator().manual_seed(seed)
    ours = torch.tensor([code for code in range(16) if code not in SMALLEST], dtype=torch.uint8)
    return ours[torch.randint(len(ours), (N, K), generator=drawn)]


def maxima(count: int, kind: str) -> Tensor:
    drawn = torch.Generator().manual_seed(1)
    e4m3 = torch.randint(1, 127, (count,), generator=drawn, dtype=torch.uint8)
    if kind == "e4m3":
        return e4m3.view(torch.float8_e4m3fn).float() * 0.013
    return torch.rand(count, generator=drawn) + 0.1


def ours(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Any:
    return foreign_weight("w", FOREIGN["bitsandbytes-fp4"], tensors, torch.empty(shape))


def meant(codes: Tensor, scale: Tensor, size: int = SIZE) -> Tensor:
    flat = VALUES[codes.flatten().long()].view(-1, size) * scale[:, None]
    return flat.view(codes.shape)


def assert_means(weight: Any, expected: Tensor) -> None:
    torch.testing.assert_close(weight.dequantize(), expected, rtol=2**-21, atol=0)


@pytest.mark.parametrize(
    ("shape", "size", "kind", "block_size"),
    [
        ((6, 64), 64, "any", 0),  # a block is a row
        ((8, 32), 64, "any", 0),  # or two
        ((5, 192), 64, "e4m3", 64),
        ((3, 256), 256, "any", 0),
        ((4, 1024), 256, "e4m3", 128),
        ((4, 48), 64, "e4m3", 16),  # blocks go over the ends of rows
    ],
    ids=str,
)
def test_exact_weights_mean_the_same(shape, size, kind, block_size):
    codes, scale = random_codes(*shape), maxima(prod(shape) // size, kind)
    weight = ours(stored(codes, scale, size), shape)
    assert weight.block_size == block_size
    assert_means(weight, meant(codes, scale, size))


def test_nested_maxima():
    codes = random_codes(4, 64)
    table, outer = torch.linspace(-1, 1, 256), torch.tensor([0.5, 2.0])
    inner = torch.tensor([3, 200, 90, 255], dtype=torch.uint8)
    tensors = stored(codes, inner, absmax=outer, quant_map=table, offset=2.5)
    scale = table[inner.long()] * outer.repeat_interleave(2) + 2.5
    assert_means(ours(tensors, (4, 64)), meant(codes, scale))


def test_blocks_without_a_maximum_take_any_code():
    codes, scale = random_codes(3, 128), maxima(6, "e4m3")
    codes[1, :64], scale[2] = 1, 0.0
    assert_means(ours(stored(codes, scale), (3, 128)), meant(codes, scale))


@pytest.mark.parametrize(
    ("kind", "smallest", "reason"),
    [("e4m3", True, r"0\.4% of its codes mean 1/192"), ("any", False, "nor E4M3 multiples")],
)
def test_what_is_not_exact_says_why_and_what_it_means(kind, smallest, reason):
    codes, scale = random_codes(2, 128), maxima(4, kind)
    codes[1, 5] = SMALLEST[1] if smallest else codes[1, 5]
    tensors = stored(codes, scale)
    with pytest.raises(InterchangeError, match=reason):
        ours(tensors, (2, 128))
    assert torch.equal(bitsandbytes.dequantized(tensors), meant(codes, scale))


def test_other_tables_are_refused():
    tensors = stored(random_codes(2, 64), maxima(2, "any"))
    with pytest.raises(InterchangeError, match="not that of bitsandbytes"):
        ours({**tensors, "quant_map": VALUES * 1.01}, (2, 64))


def checkpoint(folder: Path, *, exact: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """Linears in FP4, none or all but the down projection's exactly; and what they mean."""
    model, state, expected = tiny_llama(layers=1), {}, {}
    for name, tensor in model.state_dict().items():
        if "_proj" not in name:
            state |= {} if name == "lm_head.weight" else {name: tensor}
            continue
        codes, scale = random_codes(*tensor.shape), maxima(tensor.numel() // SIZE, "e4m3") * 0.02
        if not exact or "down_proj" in name:
            codes[0, 0], scale[0] = SMALLEST[0], 1.0
        expected[name] = meant(codes, scale)
        state |= named(name, stored(codes, scale))
    save(folder, model, state)
    model.load_state_dict(expected, strict=False)
    return model, expected


def test_a_checkpoint_keeps_in_high_precision_what_is_not_exact(tmp_path, caplog):
    model, expected = checkpoint(tmp_path / "theirs", exact=True)
    with caplog.at_level(logging.WARNING, logger="fp4compile"):
        loaded = fp4compile.from_pretrained(tmp_path / "theirs")
    down = "model.layers.0.mlp.down_proj.weight"
    weights = fp4_parameters(loaded)
    assert weights.keys() == expected.keys() - {down}
    for name, weight in weights.items():
        assert_means(weight, expected[name])
    assert torch.equal(loaded.get_parameter(down), expected[down])
    assert f"1 weights of {tmp_path / 'theirs'} stay in high precision: {down}: " in caplog.text
    ids = tokens(seed=9)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)
    # Ours from here on, also what it says of the rest.
    loaded.save_pretrained(tmp_path / "ours")
    again = fp4compile.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    again.save_pretrained(tmp_path / "again")
    about = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert "1/192" in about["skipped"][down]


def test_a_checkpoint_of_which_nothing_is_exact_is_refused(tmp_path):
    checkpoint(tmp_path, exact=False)
    with pytest.raises(InterchangeError, match=r"one of the 7 of .*down_proj.weight: .*1/192"):
        fp4compile.from_pretrained(tmp_path)


def test_weights_of_conv1d_are_turned(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_head": 2, "n_layer": 1, "vocab_size": 96, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0)).eval()
    state = dict(model.state_dict())
    del state["lm_head.weight"]
    name = "transformer.h.0.attn.c_proj.weight"  # square: its shape tells nothing
    codes, scale = random_codes(64, 64), maxima(64, "any")
    del state[name]
    save(tmp_path, model, state | named(name, stored(codes, scale)))
    loaded = fp4compile.from_pretrained(tmp_path)
    model.load_state_dict({name: meant(codes, scale).t()}, strict=False)
    assert set(fp4_parameters(loaded)) == {name}
    ids = tokens(seed=9)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)
