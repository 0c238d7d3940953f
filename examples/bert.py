"""An encoder: quantize BERT's masked language model and see whether its guesses stay the same.

python examples/bert.py bert-base-uncased
"""

import argparse

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import fp4compile
from fp4compile.batches import bundled

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="directory, or name on the Hugging Face hub")
parser.add_argument("--spec", default="w4a8")
parser.add_argument("--method", default="best")
parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
arguments = parser.parse_args()

model = AutoModelForMaskedLM.from_pretrained(arguments.model).eval()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)


def sequences(name: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of 4 as a tokenizer makes them: padding does not count, attention_mask tells it."""
    text = bundled(name)
    parts = [text[start : start + 600] for start in range(0, 600 * count, 600)]
    encoded = [
        tokenizer(
            parts[start : start + 4],
            padding=True,
            truncation=True,
            max_length=arguments.length,
            return_tensors="pt",
        )
        for start in range(0, count, 4)
    ]
    return [dict(batch) for batch in encoded]


held_out = sequences("heldout.txt", 4)[0]
with torch.no_grad():
    expected = model(**held_out).logits.argmax(-1)
fp4compile.quantize_and_compile(
    model, sequences("calibration.txt", 32), arguments.spec, method=arguments.method
)
with torch.no_grad():
    got = model(**held_out).logits.argmax(-1)

counted = held_out["attention_mask"].bool()
agree = (got == expected)[counted].float().mean()
print(f"the most likely token is the same at {agree:.1%} of {int(counted.sum())} positions")
print(model.fp4_report.summary())
