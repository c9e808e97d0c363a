"""Writes the folders of a release, to be kept for good:

python -m tests.regression 0.1.0
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import sw_transplant as sw
from tests.regression.networks import KINDS


def write(place: Path) -> None:
    """Every kind of folder, with an input and the output that the model gives for it in float32."""
    for name, (build, config) in KINDS.items():
        original = build()
        converted = sw.convert(original, config)
        with torch.no_grad():
            for parameter in converted.parameters():  # no longer what convert made: as after training
                parameter.mul_(1.25)
            images = torch.randn(2, 3, 11, 13)
            answers = {"images": images, "outputs": converted(images)}
        sw.save(converted, place / name)
        save_file(answers, place / name / "answers.safetensors")
    original, config = KINDS["laid_out"][0](), KINDS["laid_out"][1]
    converted = sw.convert(original, config)
    sw.save(converted, place / "certified")
    file = place / "certified" / "certificate.json"
    sw.verify(original, converted, input_size=12, batch_size=1, certificate=file, config=config)


if __name__ == "__main__":
    target = Path(__file__).parent / sys.argv[1]
    if target.exists():
        sys.exit(f"{target} is there already; folders of a release are never written again")
    write(target)
