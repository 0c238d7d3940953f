"""A language model: quantize, compile, compare perplexity, generate, save the recipe.

python examples/llm.py HuggingFaceTB/SmolLM2-135M-Instruct --text my_text.txt
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import fp4compile
from fp4compile.batches import bundled
from fp4compile.evaluate import perplexity

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="directory, or name on the Hugging Face hub")
parser.add_argument("--text", type=Path, help="text to calibrate on; default: a bundled excerpt")
parser.add_argument("--spec", default="w4a4")
parser.add_argument("--method", default="best")
parser.add_argument("--prompt", default="The capital of France is")
parser.add_argument("--tokens", type=int, default=2044, help="tokens to score")
parser.add_argument("--out", type=Path, default=Path("recipe.json"))
arguments = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(arguments.model)
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
texts = [arguments.text.read_text()] if arguments.text else None
ids = tokenizer(bundled("heldout.txt"), return_tensors="pt").input_ids

before = perplexity(model, ids, max_tokens=arguments.tokens)
fp4compile.quantize_and_compile(
    model, texts, arguments.spec, method=arguments.method, tokenizer=tokenizer
)
after = perplexity(model, ids, max_tokens=arguments.tokens)
print(f"perplexity: {before.perplexity:.2f} in high precision, {after.perplexity:.2f} in FP4")

prompt = tokenizer(arguments.prompt, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(answer[0], skip_special_tokens=True))

print(model.fp4_report.summary())
model.fp4_report.recipe.save(arguments.out)
