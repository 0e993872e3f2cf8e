"""Export a vision transformer with NoRA to ONNX, and run it with onnxruntime.

    python -m examples.onnx_export [--out DIR]

Needs `pip install -e ".[vision]" onnxruntime onnxscript`, no network and no GPU, and takes seconds on a CPU. The
network has random weights; attach, train or load your own instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime
import timm
import torch

import lit_adapters as la


def main() -> None:
    """Export, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the file")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=4, depth=2)
    la.attach(model, la.NoRAPlusPlus(nora=la.NoRA(groups=8, base="anchored"), lora=la.LoRA(rank=4)))
    with torch.no_grad():  # stands for a training
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.eval()
    la.merge(model)  # optional: LoRA costs nothing any more, and the file holds the functions as plain operators
    x = torch.randn(2, 3, 32, 32)
    torch.onnx.export(model, (x,), out / "model.onnx", dynamo=True, dynamic_shapes=({0: "rows"},), verbose=False)

    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    rows = torch.randn(5, 3, 32, 32)
    (found,) = session.run(None, {session.get_inputs()[0].name: rows.numpy()})
    difference = (torch.from_numpy(found) - model(rows)).abs().max()
    print(f"largest difference of the outputs in onnxruntime: {difference:.1e}")


if __name__ == "__main__":
    main()
