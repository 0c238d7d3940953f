"""Several processes calibrate one model together; all end with the same decisions.

torchrun --nproc-per-node=4 examples/torchrun.py MODEL --calibration-dir runs/a
"""

import argparse
from pathlib import Path

import torch.distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

import fp4compile

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="directory, or name on the Hugging Face hub")
parser.add_argument("--spec", default="w4a4")
parser.add_argument("--method", default="fpq")
parser.add_argument("--calibration-dir", type=Path, help="go on from here when killed")
parser.add_argument("--out", type=Path, default=Path("recipe.json"))
arguments = parser.parse_args()

torch.distributed.init_process_group("gloo")
# Every process loads the model and calls quantize with the same arguments.
model = AutoModelForCausalLM.from_pretrained(arguments.model)
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
fp4compile.quantize(
    model,
    spec=arguments.spec,
    method=arguments.method,
    tokenizer=tokenizer,
    calibration_dir=arguments.calibration_dir,
)
if torch.distributed.get_rank() == 0:
    print(model.fp4_report.summary())
    model.fp4_report.recipe.save(arguments.out)
torch.distributed.destroy_process_group()
