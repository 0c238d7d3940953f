"""The quantized key-value cache: what it stores, and that transformers can use it as any other."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_llama, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

import fp4compile
from fp4compile import ops
from fp4compile.errors import SpecError, UnknownFormatError
from fp4compile.formats import FORMATS, by_name
from fp4compile.integrations.cache import channel_scale
from fp4compile.lowering.ops.codes import decode, encode
from fp4compile.numerics import fake_quantize, steps_to_code, value_table
from fp4compile.ops.states import token_scale

CPU = torch.device("cpu")
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def quantized():
    model = tiny_llama(layers=1)
    return fp4compile.quantize(model, [tokens()], method="minmax", progress=False)


def states(length: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[2, 3, length, 20]``, with channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.arange(20) % 7 - 3.0)
    return (torch.randn(2, 3, length, 20, generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_read_is_what_was_rounded(format):
    x, channels = states(5), torch.rand(2, 3, 1, 20) + 0.5
    codes, scale = ops.quantize_states(x, channels, format)
    read = ops.dequantize_states(codes, scale, channels, format, 20, torch.float32)
    assert codes.shape[-1] * 8 >= 20 * by_name(format).bits > (codes.shape[-1] - 3) * 8
    relative = x * channels.reciprocal()
    assert torch.equal(scale, token_scale(relative, by_name(format).max_integer))
    expected = fake_quantize(relative, by_name(format), scale.float()) * channels
    assert torch.equal(read, expected)


def test_compiled_ops_give_the_same_bits():
    def there_and_back(x, channels):
        for format in ("e2m1", "e4m3"):
            codes, scale = ops.quantize_states(x, channels, format)
            yield codes
            yield scale
            yield ops.dequantize_states(codes, scale, channels, format, 20, x.dtype)

    channels = channel_scale(states(9))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: list(there_and_back(*args)), fullgraph=True)
    x = states(5, dtype=torch.bfloat16)
    x[0, 0, 0] = 0
    for one, other in zip(compiled(x, channels), there_and_back(x, channels), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("format", FORMATS)
def test_arithmetic_encodes_and_decodes_as_tables_do(format):
    """What the lowerings compute, at every value, tie and neighbour of a tie."""
    fmt = by_name(format)
    ties = torch.tensor(fmt.thresholds)
    near = torch.cat([ties, ties.nextafter(torch.tensor(0.0)), ties * 1.01, value_table(fmt, CPU)])
    steps = torch.cat([near, -near, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e30])])
    codes = steps_to_code(steps, fmt)
    assert torch.equal(encode(steps, fmt), codes)
    assert torch.equal(decode(codes, fmt), value_table(fmt, CPU)[codes.int()])


def test_channels_are_relative_to_the_largest_of_their_head():
    keys = torch.ones(1, 2, 4, 3) * torch.tensor([8.0, 1.0, 1e-6])
    keys[:, 1] *= 100
    assert torch.equal(channel_scale(keys)[0, :, 0], torch.tensor([[1.0, 1 / 8, 1 / 64]] * 2))
    assert torch.isfinite(channel_scale(torch.zeros(1, 2, 4, 3))).all()


@pytest.mark.parametrize("length", [None, 12], ids=["growing", "static"])
def test_a_cache_is_the_same_in_one_call_and_in_many(llama, length):
    """Once the first tokens have decided the channels."""
    keys, values = states(10, 1), states(10, 2)
    caches = [fp4compile.QuantizedCache(llama.config, max_cache_len=length) for _ in range(2)]
    for layer in (cache.layers[0] for cache in caches):
        layer.update(keys[..., :4, :], values[..., :4, :])
    once = caches[0].update(keys[..., 4:, :], values[..., 4:, :], 0)
    for index in range(4, 10):
        one = caches[1].update(keys[..., index, None, :], values[..., index, None, :], 0)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 10
    assert all(torch.equal(a, b) for a, b in zip(once, one, strict=True))


@pytest.mark.parametrize("length", [None, 32], ids=["growing", "static"])
def test_rows_of_a_batch_do_not_change_each_other(llama, length):
    def logits(ids):
        cache = fp4compile.QuantizedCache(llama.config, max_cache_len=length)
        llama(ids[:, :16], past_key_values=cache)
        return llama(ids[:, 16:], past_key_values=cache).logits

    ids = tokens(2)
    torch.testing.assert_close(logits(ids)[1:], logits(ids[1:]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [None, 40], ids=["growing", "static"])
def test_more_bits_come_nearer_to_full_precision(llama, length):
    ids = tokens()

    def last(cache):
        llama(ids[:, :16], past_key_values=cache)
        return llama(ids[:, 16:], past_key_values=cache).logits

    expected = last(DynamicCache())
    errors = [
        (last(fp4compile.QuantizedCache(llama.config, bits, max_cache_len=length)) - expected)
        .square()
        .sum()
        for bits in (4, 6, 8)
    ]
    assert 0 < errors[2] < errors[1] < errors[0] < 0.2 * expected.square().sum()


def test_memory_is_that_of_codes_and_scales(llama):
    ids = tokens(2, 20)
    static = fp4compile.QuantizedCache(llama.config, max_cache_len=64)
    growing = fp4compile.QuantizedCache(llama.config, keys="e4m3")
    for cache in (static, growing):
        assert cache.nbytes == 0
        llama(ids, past_key_values=cache)
    rows, heads, width, layers = 2, 2, 16, 2
    channels = layers * rows * heads * width * 4
    assert static.nbytes == layers * rows * heads * 64 * 2 * (width // 2 + 2) + channels
    growing_bytes = layers * rows * heads * 20 * (width + width // 2 + 2 * 2) + channels
    assert growing.nbytes == growing_bytes


class RoundedLayer(DynamicLayer):
    """Holds in full precision what codes can say: the reference of a quantized layer at 4 bits."""

    channels = None

    def update(self, keys, values, *args, **kwargs):
        if self.channels is None:
            self.channels = channel_scale(keys)
        relative = keys * self.channels.reciprocal()
        return super().update(rounded(relative) * self.channels, rounded(values))

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.channels = self.channels.index_select(0, beam_idx)


def rounded(x: torch.Tensor) -> torch.Tensor:
    fmt = by_name("e2m1")
    return fake_quantize(x, fmt, token_scale(x, fmt.max_integer).float())


@pytest.mark.parametrize("length", [None, 64], ids=["growing", "static"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str
)
def test_generate_takes_it(llama, length, options):
    ids = tokens(2, 12)
    cache = fp4compile.QuantizedCache(llama.config, max_cache_len=length)
    made = llama.generate(ids, past_key_values=cache, **GREEDY, **options)
    assert cache.get_seq_length() == made.shape[1] - 1
    reference = Cache(layers=[RoundedLayer() for _ in cache.layers])
    assert torch.equal(made, llama.generate(ids, past_key_values=reference, **GREEDY, **options))


def test_a_cache_can_be_used_again_after_a_reset(llama):
    for length in (None, 64):
        cache = fp4compile.QuantizedCache(llama.config, max_cache_len=length)
        first = llama.generate(tokens(2, 12), past_key_values=cache, **GREEDY)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(llama.generate(tokens(2, 12), past_key_values=cache, **GREEDY), first)


def test_the_end_of_a_growing_cache_can_be_cut_off(llama):
    cache = fp4compile.QuantizedCache(llama.config)
    ids = tokens(2, 20)
    llama(ids[:, :12], past_key_values=cache)
    before = {name: held.clone() for name, held in cache.layers[1].tensors.items()}
    llama(ids[:, 12:], past_key_values=cache)
    cache.crop(-8)
    after = cache.layers[1].tensors
    assert all(torch.equal(held, after[name]) for name, held in before.items())


def test_layers_with_a_sliding_window_are_masked_as_ever():
    config = AutoConfig.for_model(
        "gemma3_text", hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, vocab_size=96, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = tokens(2, 20)
    with torch.no_grad():
        expected = model(ids, past_key_values=DynamicCache(config=config)).logits
        cache = fp4compile.QuantizedCache(config, bits=8)
        model(ids[:, :12], past_key_values=cache)
        found = model(ids[:, 12:], past_key_values=cache).logits
    assert (found - expected[:, 12:]).square().sum() < 1e-3 * expected[:, 12:].square().sum()


def test_what_cannot_be_stored_is_refused(llama):
    with pytest.raises(UnknownFormatError, match="no format has 5 bits"):
        fp4compile.QuantizedCache(llama.config, bits=5)
    with pytest.raises(UnknownFormatError, match="e9m9"):
        fp4compile.QuantizedCache(llama.config, keys="e9m9")
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
    with pytest.raises(SpecError, match="linear_attention"):
        fp4compile.QuantizedCache(config)


@pytest.mark.parametrize("length", [None, 64], ids=["growing", "static"])
def test_one_graph_for_the_prompt_and_one_for_every_later_token(quantized, length):
    """Without a graph break, and with the tokens of eager calls."""
    model = copy.deepcopy(quantized)

    def generate():
        cache = fp4compile.QuantizedCache(model.config, max_cache_len=length)
        return model.generate(tokens(2, 12), past_key_values=cache, **GREEDY)

    eager = generate()
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model.generation_config.disable_compile = True
    model.compile(backend=graphs, dynamic=True, fullgraph=True)
    assert torch.equal(generate(), eager)
    assert graphs.frame_count <= 3  # a cache of one row of tokens is seen as a special case
