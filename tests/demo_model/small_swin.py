"""A small Swin trained on the demo's scenes, to measure evidence on a model without chained maps.

Run it with ``python -m tests.demo_model.small_swin --output FOLDER``; on two cores it takes some
ten minutes. The folder is a model that vitviz takes by ``-m FOLDER``, with 80 scenes of the same
kind that it has not seen, and their masks; none is shipped.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from timm.models import SwinTransformer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.demo_model import CLASSES
from tests.demo_model.muon import Muon
from tests.demo_model.samples import UNSEEN, write_scenes
from tests.demo_model.scenes import SceneStyle, paint_scene
from tests.demo_model.train import Round, as_tensor, batches, paint, painters

__all__ = ["ARGUMENTS", "train"]

ARGUMENTS = {
    "img_size": 64,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 48,
    "depths": [2, 4, 2],
    "num_heads": [2, 4, 8],
}
_SCENES = SceneStyle(max_objects=2, radius=(0.235, 0.35), clutter=0.8)
_ROUND = Round(size=64, scenes=12_000, passes=8, style=_SCENES)
_SIDE = 128  # of the scenes to measure with, in pixels; the model sees 64
_PEAK_RATES = (4e-3, 1e-3)  # of Muon and of AdamW
_WARMUP = 150  # steps


def train(seed: int, stage: Round = _ROUND) -> SwinTransformer:
    """Train the model on one round of scenes; return the average of its last steps."""
    torch.manual_seed(seed)
    model = SwinTransformer(num_classes=len(CLASSES), **ARGUMENTS)
    cells = nn.Linear(2 * ARGUMENTS["embed_dim"], len(CLASSES) + 1)  # labels of 8 × 8 patches
    matrices = [each for each in model.layers.parameters() if each.dim() == 2]
    chosen = {id(each) for each in matrices}
    others = [each for each in model.parameters() if id(each) not in chosen]
    optimizers = (Muon(matrices), torch.optim.AdamW([*others, *cells.parameters()]))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    with painters() as pool:
        scenes = paint(pool, stage, stream=seed + 1, first=0)
    console = Console(stderr=True)
    kept: list[Tensor] = []
    model.layers[1].register_forward_hook(lambda part, inputs, output: kept.append(output))
    for step, batch in enumerate(batches(scenes, stage.passes)):
        rate = min(1.0, (step + 1) / _WARMUP) * (1 - step / stage.steps)
        logits = model(as_tensor(batch.images))
        loss = binary_cross_entropy_with_logits(logits, batch.labels)
        of_cells = cross_entropy(cells(kept.pop()).flatten(0, 2), batch.cells.flatten())
        for optimizer, peak in zip(optimizers, _PEAK_RATES, strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        torch.autograd.backward(loss + 0.5 * rate * of_cells)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(model)
        if step % 100 == 0:
            console.print(f"step {step} of {stage.steps}, loss {loss.item():.3f}")
    return average.module.eval()


def main() -> None:
    """Train, and write a folder of weights and config."""
    parser = argparse.ArgumentParser(description="Train a small Swin on the demo's scenes.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    model = train(options.seed)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        options.output / "model.safetensors",
    )
    config = {
        "architecture": "swin_tiny_patch4_window7_224",
        "problem_type": "multi_label_classification",
        "num_classes": len(CLASSES),
        "label_names": CLASSES,
        "model_args": ARGUMENTS,
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "fixed_input_size": True,
            "classifier": "head.fc",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
    }
    text = json.dumps(config, indent=2)
    (options.output / "config.json").write_text(text + "\n", encoding="utf-8")
    scenes = ((str(seed), paint_scene(seed, size=_SIDE, style=_SCENES)) for seed in UNSEEN)
    write_scenes(options.output, scenes)


if __name__ == "__main__":
    main()
