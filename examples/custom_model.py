"""Any torch module: quantize a transformer block of your own, look at the report, repeat the run.

python examples/custom_model.py --report report.html
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fp4compile

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--channels", type=int, default=256)
parser.add_argument("--report", type=Path, default=Path("report.html"))
arguments = parser.parse_args()


class Block(nn.Module):
    """Sites are found by what the forward computes: no nn.Linear is needed for ``down``."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Parameter(torch.randn(4 * channels, channels) * channels**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, channels = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).unbind(2)
        attention = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        x = x + attention.transpose(1, 2).reshape(batch, length, channels)
        return x + F.gelu(self.up(x)) @ self.down


torch.manual_seed(0)
model, copy = Block(arguments.channels), Block(arguments.channels)
copy.load_state_dict(model.state_dict())
spread = torch.exp2(3 * torch.randn(arguments.channels))  # channels as unlike as in real models
batches = [torch.randn(4, 32, arguments.channels) * spread for _ in range(4)]

with torch.no_grad():
    expected = model(batches[0])
    fp4compile.quantize_and_compile(model, batches, "w4a4", report=arguments.report)
    error = (model(batches[0]) - expected).square().mean() / expected.square().mean()
print(f"relative error {error:.4f}; the report is in {arguments.report}")

fp4compile.quantize(copy, batches[:1], recipe=model.fp4_report.recipe)  # same bits, no search
assert torch.equal(copy.down.dequantize(), model.down.dequantize())
