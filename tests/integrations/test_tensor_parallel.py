"""Two processes that share a model compute what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_llama, tiny_mixtral, tokens
from torch import nn

import fp4compile
from fp4compile.integrations.serialize import fp4_parameters

TESTS = Path(__file__).parents[1]
DATA = [tokens(seed=1)]
BLOCK = fp4compile.TensorSpec(4, ("e2m1", "e1m2"), "block", block_size=16)
W4A4 = fp4compile.QuantSpec.preset("w4a4")


def llama_with_biases() -> nn.Module:
    """Of the linears that are cut along K too, where only one process may add them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = tiny_llama(layers=1).config
    config = LlamaConfig(**{**config.to_dict(), "attention_bias": True, "mlp_bias": True})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def small_llama() -> nn.Module:
    return tiny_llama(layers=1)


# Name -> model, spec, options, whether every bit must be the same.
CASES = {
    "static": (small_llama, W4A4, {"method": "fpq"}, True),
    "token": (small_llama, W4A4.per_token(), {"method": "minmax"}, True),
    "biases": (llama_with_biases, W4A4, {"method": "minmax"}, True),
    # Some of a role in FP4 and some not, an embedding and a head in high precision.
    "partly": (
        tiny_llama,
        W4A4,
        {"method": "minmax", "ignore": ["*.0.mlp.*", "*.1.self_attn.*", "*embed*"]},
        False,
    ),
    "blocks": (small_llama, fp4compile.QuantSpec(BLOCK, BLOCK, BLOCK), {"method": "minmax"}, False),
    # Rotated by as many channels as there are: what is behind cannot be cut along K.
    "best": (small_llama, "w4a4", {"method": "best"}, True),
    "experts": (tiny_mixtral, W4A4, {"method": "minmax"}, False),
}
WORKER = """
import json, sys, torch, fp4compile
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from fp4compile.errors import ShardingError
from fp4compile.integrations.serialize import fp4_parameters

folder, *names = sys.argv[1:]
ids = torch.load(f"{folder}/ids.pt")
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(
        f"{folder}/{name}", distributed_config=DistributedConfig(tp_size=2)
    )
    with torch.no_grad():
        torch.save(model(ids).logits, f"{folder}/{name}.{rank}.logits")
    written = model.generate(ids[:1, :5], max_new_tokens=3, do_sample=False)
    torch.save(written, f"{folder}/{name}.{rank}.ids")
    found[name] = {name: list(weight.shape) for name, weight in fp4_parameters(model).items()}
try:
    model.save_pretrained(f"{folder}/again")
except ShardingError as error:
    found["saving"] = str(error)
try:
    AutoModelForCausalLM.from_pretrained(
        f"{folder}/{names[0]}",
        distributed_config=DistributedConfig(
            tp_size=2, tp_plan={"model.layers.*.mlp.up_proj": "rowwise_rep"}
        ),
    )
except ShardingError as error:
    found["override"] = str(error)
json.dump(found, open(f"{folder}/{rank}.json", "w"))
dist.barrier()  # nobody leaves while another still needs it
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {
        name: fp4compile.quantize(make(), DATA, spec, progress=False, **options)
        for name, (make, spec, options, _) in CASES.items()
    }


@pytest.fixture(scope="module")
def shared(models, tmp_path_factory) -> Path:
    """What two processes computed with all models."""
    folder = tmp_path_factory.mktemp("shared")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    torch.save(tokens(seed=9), folder / "ids.pt")
    (folder / "worker.py").write_text(WORKER)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
    ran = subprocess.run(
        [sys.executable, *launcher, "--nproc-per-node=2", folder / "worker.py", folder, *models],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_both_processes_get_the_logits_of_one(case, models, shared):
    exact = CASES[case][-1]
    expected = models[case](tokens(seed=9)).logits
    for rank in (0, 1):
        logits = torch.load(shared / f"{case}.{rank}.logits")
        if exact:
            assert torch.equal(logits, expected)
        else:
            # One float32 rounding more before an activation is rounded may move a code: few do.
            error = (logits - expected).float().square().mean() / expected.float().square().mean()
            assert float(error) < 2e-3


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[-1]])
def test_generate_writes_the_same_tokens(case, models, shared):
    ids = tokens(seed=9)[:1, :5]
    expected = models[case].generate(ids, max_new_tokens=3, do_sample=False)
    for rank in (0, 1):
        assert torch.equal(torch.load(shared / f"{case}.{rank}.ids"), expected)


def test_each_process_holds_a_part_of_every_weight(models, shared):
    for rank in (0, 1):
        found = json.loads((shared / f"{rank}.json").read_text())
        for case in CASES:
            whole = {name: weight.numel() for name, weight in fp4_parameters(models[case]).items()}
            parts = {name: torch.Size(shape).numel() for name, shape in found[case].items()}
            # Mixtral's plan divides neither the router nor what it does not name.
            cut = {name for name in whole if "gate.weight" not in name}
            assert cut
            assert {name: 2 * parts[name] for name in cut} == {name: whole[name] for name in cut}


def test_what_is_not_defined_is_refused(shared):
    found = json.loads((shared / "0.json").read_text())
    assert "parts are not saved" in found["saving"]
    assert "up_proj.weight is an FP4 weight and its" in found["override"]
    assert "style is 'rowwise_rep'" in found["override"]
