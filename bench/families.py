"""Every family of models that must work, each from a tiny random configuration.

``tests/test_families.py`` runs the table, and ``python -m bench families`` writes what it finds
into ``docs/models.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fp4compile
from bench.family_checks import Batch, is_one_graph, relative_error, reloads
from bench.plain_models import PLAIN
from fp4compile.compile import uncompiled
from fp4compile.qparams import SiteQParams
from fp4compile.recipe import Recipe

VOCABULARY, BATCH, LENGTH, TARGET_LENGTH = 96, 4, 12, 6
TOKENS = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
TEXT = {**SIZES, **TOKENS}
GQA = {**TEXT, "num_key_value_heads": 2}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}
EXPERTS = {**GQA, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SEQ2SEQ = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "decoder_start_token_id": 2,
    **TOKENS,
}


@dataclass(frozen=True)
class Family:
    """``build()`` a model with random weights; ``batch(seed)`` a call of it. ``kept``: last
    names of the parameters of two or more dimensions that stay in high precision; ``ignore``:
    patterns of those that are left out.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    kind: str
    generates: bool = False
    kept: frozenset[str] = frozenset()
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilyResult:
    """``error``: squared difference of the first output over its square, at w8a8 min-max;
    ``one_graph``: with ``torch.compile(fullgraph=True)``; ``reloaded``: to the bit.
    """

    name: str
    kind: str
    quantized: int
    folded: int
    kept: tuple[str, ...]
    error: float
    generated: bool | None
    reloaded: bool
    one_graph: bool = False

    @property
    def kept_names(self) -> frozenset[str]:
        """Last names of the parameters that stayed."""
        names = (reason.partition(": ")[0] for reason in self.kept)
        return frozenset(name.rpartition(".")[2] for name in names)


def _text(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)}


def _padded_text(seed: int) -> Batch:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, LENGTH // 2 :] = 0
    return {**_text(seed), "attention_mask": mask}


def _images(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator)}


def _translation(seed: int) -> Batch:
    target = _text(seed + 7)["input_ids"][:, :TARGET_LENGTH]
    return {**_padded_text(seed), "decoder_input_ids": target}


def _speech(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(BATCH, 16, 40, generator=generator),
        "decoder_input_ids": _text(seed)["input_ids"][:, :TARGET_LENGTH],
    }


def _hugging_face(model_class: str, model_type: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # tiny sizes provoke advice
        try:
            config = transformers.AutoConfig.for_model(model_type, **sizes)
            found = getattr(transformers, model_class)
            make = getattr(found, "_from_config", None) or found.from_config
            model: nn.Module = make(config)
        finally:
            transformers.logging.set_verbosity(verbosity)
        return model

    return build


def _language_model(model_type: str, **sizes: Any) -> Family:
    build = _hugging_face("AutoModelForCausalLM", model_type, **sizes)
    return Family(build, _text, "language model", generates=True)


def _lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base: Any = _hugging_face("AutoModelForCausalLM", "llama", **TEXT)()
    # Without init_lora_weights=False the adapters would compute zero.
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: nn.Module = get_peft_model(base, config)
    return model


def _merged_lora() -> nn.Module:
    adapted: Any = _lora()
    model: nn.Module = adapted.merge_and_unload()
    return model


FAMILIES: dict[str, Family] = {
    "Llama": _language_model("llama", **GQA),
    "Mistral": _language_model("mistral", **GQA, sliding_window=8),
    "Qwen2": _language_model("qwen2", **GQA),
    "Qwen3": _language_model("qwen3", **GQA, head_dim=16),
    "Gemma": _language_model("gemma", **GQA, head_dim=16),
    "Gemma 2": _language_model("gemma2", **GQA, head_dim=16, sliding_window=8),
    "Gemma 3": _language_model("gemma3_text", **GQA, head_dim=16, sliding_window=8),
    "Phi": _language_model("phi", **TEXT),
    "Phi-3": _language_model("phi3", **GQA),
    "GPT-2": _language_model(
        "gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=64, vocab_size=VOCABULARY,
        bos_token_id=1, eos_token_id=2,
    ),
    "GPT-NeoX": _language_model("gpt_neox", **TEXT),
    "OPT": _language_model("opt", **TEXT, ffn_dim=128, word_embed_proj_dim=64),
    "Falcon": _language_model("falcon", **TEXT),
    "OLMo": _language_model("olmo", **GQA),
    "OLMo 2": _language_model("olmo2", **GQA),
    "SmolLM3": _language_model("smollm3", **GQA),
    "Mixtral": _language_model("mixtral", **EXPERTS, num_local_experts=4),
    "Qwen2-MoE": _language_model(
        "qwen2_moe", **EXPERTS, num_experts=4, shared_expert_intermediate_size=64
    ),
    "Qwen3-MoE": _language_model("qwen3_moe", **EXPERTS, num_experts=4, head_dim=16),
    "gpt-oss": replace(
        _language_model("gpt_oss", **EXPERTS, num_local_experts=4, head_dim=16),
        kept=frozenset({"gate_up_proj_bias", "down_proj_bias"}),
    ),
    "BERT": Family(_hugging_face("BertModel", "bert", **TEXT), _padded_text, "encoder"),
    "BERT, masked words": Family(
        _hugging_face("BertForMaskedLM", "bert", **TEXT), _padded_text, "encoder"
    ),
    "RoBERTa": Family(
        _hugging_face("RobertaForSequenceClassification", "roberta", **TEXT),
        _padded_text,
        "encoder",
    ),
    "DistilBERT": Family(
        _hugging_face(
            "DistilBertModel", "distilbert", dim=64, hidden_dim=128, n_layers=1, n_heads=4,
            vocab_size=VOCABULARY, max_position_embeddings=64,
        ),
        _padded_text,
        "encoder",
    ),
    # Its layers share their weights.
    "ALBERT": Family(
        _hugging_face(
            "AlbertModel", "albert", **{**TEXT, "num_hidden_layers": 2}, embedding_size=32
        ),
        _padded_text,
        "encoder",
    ),
    "ModernBERT": Family(
        _hugging_face("ModernBertModel", "modernbert", **TEXT), _padded_text, "encoder"
    ),
    "ViT": Family(
        _hugging_face("ViTForImageClassification", "vit", **IMAGE),
        _images,
        "vision",
        kept=frozenset({"cls_token", "position_embeddings"}),
    ),
    "DeiT": Family(
        _hugging_face("DeiTForImageClassification", "deit", **IMAGE),
        _images,
        "vision",
        kept=frozenset({"cls_token", "distillation_token", "position_embeddings"}),
    ),
    "CLIP vision": Family(
        _hugging_face("CLIPVisionModel", "clip_vision_model", **IMAGE), _images, "vision"
    ),
    "CLIP text": Family(
        _hugging_face("CLIPTextModel", "clip_text_model", **TEXT), _padded_text, "encoder"
    ),
    "T5": Family(
        _hugging_face(
            "T5ForConditionalGeneration", "t5", d_model=64, d_kv=16, d_ff=128, num_layers=1,
            num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0,
        ),
        _translation,
        "encoder-decoder",
        generates=True,
    ),
    "BART": Family(
        _hugging_face("BartForConditionalGeneration", "bart", **SEQ2SEQ),
        _translation,
        "encoder-decoder",
        generates=True,
    ),
    "Whisper": Family(
        _hugging_face(
            "WhisperForConditionalGeneration", "whisper", **SEQ2SEQ, num_mel_bins=16,
            max_source_positions=20, max_target_positions=32,
            suppress_tokens=None, begin_suppress_tokens=None,
        ),
        _speech,
        "encoder-decoder",
        generates=True,
        # The convolutions overlap; the decoder's positions are taken by index.
        kept=frozenset({"weight"}),
    ),
    "Llama with LoRA (peft)": Family(
        _lora,
        _text,
        "language model",
        generates=True,
        kept=frozenset({"weight"}),
        ignore=("*.lora_*",),
    ),
    "Llama with merged LoRA": Family(_merged_lora, _text, "language model", generates=True),
    **{
        name: Family(model.build, model.batch, "plain PyTorch", kept=frozenset(model.kept))
        for name, model in PLAIN.items()
    },
}  # fmt: skip


def run(names: Sequence[str]) -> Iterator[FamilyResult]:
    """Quantize and call every family."""
    logging.getLogger("fp4compile").setLevel(logging.ERROR)
    for name in names:
        yield replace(check(name), folded=count_folds(name), one_graph=compiles_whole(name))


def check(name: str) -> FamilyResult:
    """Build, quantize at w8a8 with min-max on two batches, and call with a third."""
    family = FAMILIES[name]
    reference, model = _built(family), _built(family)
    report = _quantize(model, family, "w8a8", method="minmax")
    return FamilyResult(
        name,
        family.kind,
        len(report.sites),
        0,
        tuple(f"{parameter}: {why}" for parameter, why in report.skipped.items()),
        relative_error(model, reference, family.batch(9)),
        _generates(model, family.batch(9)) if family.generates else None,
        reloads(uncompiled(model), uncompiled(reference), family.batch(9)),
    )


def compiles_whole(name: str) -> bool:
    """Whether the quantized model is one graph to ``torch.compile``."""
    model = _built(FAMILIES[name])
    _quantize(model, FAMILIES[name], "w8a8", method="minmax")
    return is_one_graph(uncompiled(model), FAMILIES[name].batch(9))


def count_folds(name: str) -> int:
    """How many weights could get their input's exponent shifts from what produces it: of as many it
    is so where every channel is shifted by one.
    """
    family = FAMILIES[name]
    model = _built(family)
    decided = _quantize(model, family, "w4a4", method="minmax").recipe.sites
    shifted = {
        site: _shifted(decision, uncompiled(model).get_parameter(site))
        for site, decision in decided.items()
    }
    again = _built(family)
    fp4compile.quantize(again, [family.batch(1)], recipe=Recipe(shifted))
    report: Any = again.fp4_report
    return sum(site.shift_folded_into is not None for site in report.sites)


def _shifted(decision: SiteQParams, weight: Any) -> SiteQParams:
    if decision.activation is None:
        return decision
    shift = torch.ones(weight.reduction, dtype=torch.int8)
    return replace(decision, activation=replace(decision.activation, exponent_shift=shift))


def _built(family: Family) -> nn.Module:
    torch.manual_seed(0)
    return family.build().eval()


def _quantize(model: Any, family: Family, spec: str, **options: Any) -> Any:
    batches = [family.batch(1), family.batch(2)]
    ignore = family.ignore or None
    fp4compile.quantize(model, batches, spec, ignore=ignore, progress=False, **options)
    return model.fp4_report


def _generates(model: Any, batch: Batch) -> bool:
    """Three tokens, prefill and decode."""
    if "input_features" in batch:
        prompt = {"input_features": batch["input_features"][:2]}
    else:
        prompt = {"input_ids": batch["input_ids"][:2, :4]}
    new = 3
    out = model.generate(**prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    # Whisper returns what is new, the others what was given, too.
    return bool(out.shape[1] >= new)


# The table in the docs stands between these.
BEGIN, END = "<!-- families -->", "<!-- end of families -->"


def table(results: Sequence[FamilyResult]) -> str:
    """Markdown."""
    lines = [
        "| family | kind | quantized | can fold | in high precision | error | one graph | generate "
        "| save, load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        kept = "; ".join(sorted({_short(reason) for reason in result.kept})) or "nothing"
        graph, generated, reloaded = (
            {None: "", True: "yes", False: "no"}[each]
            for each in (result.one_graph, result.generated, result.reloaded)
        )
        lines.append(
            f"| {result.name} | {result.kind} | {result.quantized} | {result.folded} | {kept} "
            f"| {result.error:.4f} | {graph} | {generated} | {reloaded} |"
        )
    return "\n".join(lines)


def _short(reason: str) -> str:
    name, _, why = reason.partition(": ")
    return f"`{name.rsplit('.', 1)[-1]}` ({why})"


def write_table(page: Path, results: Sequence[FamilyResult]) -> None:
    """Put the table of ``results`` into ``page``."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")
