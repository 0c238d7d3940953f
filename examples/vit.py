"""An image classifier: quantize a vision transformer on a folder of images.

python examples/vit.py google/vit-base-patch16-224 --images photos/
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageClassification

import fp4compile

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="directory, or name on the Hugging Face hub")
parser.add_argument("--images", type=Path, required=True, help="folder of .jpg or .png files")
parser.add_argument("--spec", default="w4a8")
parser.add_argument("--method", default="best")
arguments = parser.parse_args()

model = AutoModelForImageClassification.from_pretrained(arguments.model).eval()
size = model.config.image_size


def pixels(path: Path) -> torch.Tensor:
    """[3, size, size] in -1..1, as ViT was trained; other models: use their image processor."""
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(size, size, 3).permute(2, 0, 1).float() / 127.5 - 1


files = sorted(path for path in arguments.images.iterdir() if path.suffix in (".jpg", ".png"))
images = torch.stack([pixels(path) for path in files])
batches = [{"pixel_values": part} for part in images.split(8)]

with torch.no_grad():
    expected = model(images).logits
fp4compile.quantize_and_compile(model, batches, arguments.spec, method=arguments.method)
with torch.no_grad():
    got = model(images).logits

same = int((got.argmax(-1) == expected.argmax(-1)).sum())
error = (got - expected).square().mean() / expected.square().mean()
print(f"same class for {same} of {len(files)} images, relative error of the logits {error:.4f}")
print(model.fp4_report.summary())
