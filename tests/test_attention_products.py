"""Products of attention on rounded operands: what they compute, how they are decided and kept."""

from __future__ import annotations

import copy

import pytest
import torch
from models import NormThenLinears, tiny_llama, tokens
from torch.nn import functional as F

import fp4compile
from fp4compile.attention_products import (
    OPERANDS,
    AttentionCall,
    AttentionObserver,
    AttentionProducts,
    attention,
    search_attention,
)
from fp4compile.errors import SpecError, UnsupportedOperationError
from fp4compile.formats import FORMATS, by_name
from fp4compile.integrations.attention import NAME, attach_products, attend, products_of
from fp4compile.numerics import fake_quantize
from fp4compile.qparams import ActivationQParams, TensorSpec

IDS = tokens(4, 12)
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([10, 11]), 0)
CALL = {"input_ids": IDS, "attention_mask": MASK}


def tiny_bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def plain():
    return tiny_bert()


@pytest.fixture(scope="module")
def quantized(plain):
    return fp4compile.quantize(
        copy.deepcopy(plain), [CALL], "w4a4", method="minmax", attention=True, progress=False
    )


def qkv(heads: int = 4, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (4, heads, heads)
    return tuple(torch.randn(2, size, 6, 8, generator=generator) for size in sizes)


def products(format: str, scale: float = 0.3) -> AttentionProducts:
    static = ActivationQParams(format, "tensor", torch.tensor(scale))
    return AttentionProducts(dict.fromkeys(OPERANDS, static))


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_without_products_it_is_attention(heads):
    q, k, v = qkv(heads)
    mask = torch.randn(2, 1, 6, 6)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(attention(AttentionCall(q, k, v, mask, 0.4))[0], expected)


@pytest.mark.parametrize("format", FORMATS)
def test_every_operand_is_rounded_by_its_scale(format):
    q, k, v = qkv()

    def rounded(x):
        return fake_quantize(x, by_name(format), torch.tensor(0.3))

    scores = rounded(q) @ rounded(k).mT * 0.5
    expected = rounded(scores.softmax(dim=-1)) @ rounded(v)
    got, _ = attention(AttentionCall(q, k, v, scaling=0.5), products(format))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_search_is_no_worse_than_minmax_in_the_formats_of_its_width(bits):
    observer = AttentionObserver()
    for seed in range(3):
        call = AttentionCall(*qkv(2, seed))
        output, probability = attention(call)
        observer.update(call, probability, output)
    spec = TensorSpec(bits, granularity="tensor")
    minmax = search_attention(observer.value, spec, minmax=True)
    found = search_attention(observer.value, spec)
    assert found.error <= found.minmax_error == minmax.error == minmax.minmax_error
    assert bits > 4 or found.error < minmax.error
    assert {by_name(found.operands[name].format).bits for name in OPERANDS} == {bits}
    fixed = search_attention(observer.value, TensorSpec(bits, (spec.candidates[0].name,)))
    assert {operand.format for operand in fixed.operands.values()} == {spec.candidates[0].name}


def test_scales_stay_float32_in_a_model_that_is_cast():
    made = products("e2m1", 0.3).to(torch.bfloat16)
    assert made.to_dict() == products("e2m1", 0.3).to_dict()
    assert AttentionProducts.from_dict(made.to_dict()).to_dict() == made.to_dict()


@torch.no_grad()
def test_the_report_names_every_attention_and_its_operands(plain, quantized):
    report = quantized.fp4_report
    assert [made.name for made in report.attention] == [
        f"encoder.layer.{index}.attention.self" for index in range(2)
    ]
    assert all(set(made.formats) == set(OPERANDS) for made in report.attention)
    assert products_of(quantized).keys() == {made.name for made in report.attention}
    assert "products of 2 attentions quantized" in report.summary()
    assert report.to_dict()["attention"][0]["formats"]["query"] == "e2m1"


@torch.no_grad()
def test_attention_alone_costs_less_with_more_bits(plain):
    expected = plain(**CALL).last_hidden_state
    errors = []
    for bits in (4, 6, 8):
        model = copy.deepcopy(plain)
        spec = fp4compile.QuantSpec.preset("w8a8")
        options = {"attention": TensorSpec(bits, granularity="tensor"), "method": "minmax"}
        fp4compile.quantize(model, [CALL], spec, targets=["*.0.output*"], progress=False, **options)
        errors.append(float((model(**CALL).last_hidden_state - expected).square().mean()))
    assert errors[0] > errors[1] > errors[2] > 0


@torch.no_grad()
def test_a_saved_model_has_its_products_again(quantized, tmp_path):
    from transformers import AutoModel

    quantized.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**CALL)[0], quantized(**CALL)[0])
    saved = {name: made.to_dict() for name, made in products_of(quantized).items()}
    assert {name: made.to_dict() for name, made in products_of(loaded).items()} == saved


@torch.no_grad()
def test_they_are_part_of_the_compiled_graph(quantized):
    eager = quantized(**CALL)[0]
    torch._dynamo.reset()
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(**CALL)[0], eager)


@torch.no_grad()
def test_a_language_model_generates_the_same_with_and_without_a_cache():
    model = tiny_llama()
    static = ActivationQParams("e3m4", "tensor", torch.tensor(0.02))
    made = AttentionProducts(dict.fromkeys(OPERANDS, static))
    attach_products(model, {f"model.layers.{index}.self_attn": made for index in range(2)})
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(IDS, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize(
    ("spec", "model", "message"),
    [
        ("w4a16", tiny_bert, "no bits for activations"),
        ("w4a4", NormThenLinears, "models of transformers"),
    ],
    ids=["no activations", "no transformer"],
)
def test_what_has_no_products_is_refused_and_left_alone(spec, model, message):
    model = model()
    data = [CALL] if model.__class__.__name__ == "BertModel" else [torch.randn(4, 32)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SpecError, match=message):
        fp4compile.quantize(model, data, spec, method="minmax", attention=True, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_an_attention_does_besides_is_refused():
    with pytest.raises(UnsupportedOperationError, match="takes cache"):
        attend(torch.nn.Identity(), *qkv(), None, cache=object())


def tiny_gpt_oss():
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=32, intermediate_size=16, num_hidden_layers=1, vocab_size=96,
        num_local_experts=2, num_experts_per_tok=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def tiny_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=96, d_model=32, d_kv=16, num_heads=2, num_layers=1, d_ff=32,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "call"),
    [(tiny_gpt_oss, {"input_ids": IDS}), (tiny_t5, {**CALL, "decoder_input_ids": IDS[:, :5]})],
    ids=["sinks", "position bias"],
)
def test_sinks_and_position_biases_are_the_models_own(model, call):
    model = model()
    expected = model(**call).logits
    model.set_attn_implementation(NAME)  # without products: in full precision
    torch.testing.assert_close(model(**call).logits, expected)
    model.set_attn_implementation("eager")
    fp4compile.quantize(model, [call], "w8a8", method="minmax", attention=True, progress=False)
    kinds = len(products_of(model))
    assert kinds == len(model.fp4_report.attention) == (1 if len(call) == 1 else 3)
    assert all(0 < each.error < 0.05 for each in model.fp4_report.attention)
