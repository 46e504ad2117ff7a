"""Train a shapes classifier: `python -m eval.shapes.train [NAME]`, minutes on one CPU core."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy

from eval.shapes.classifier import CLASSIFIERS, HERE, Classifier, PatchClassifier, labels
from eval.shapes.scenes import captions, draw, parse

SEEDS = {"classifier": 0, "patches": 1}


def images_and_labels(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n scenes in [-1, 1], and the indices (n, 4) of their attributes."""
    texts = captions(n, seed)
    return draw(texts, seed).float() / 127.5 - 1, labels([parse(c) for c in texts])


def train(
    name: str = "classifier", steps: int = 1500, batch: int = 128
) -> tuple[Classifier | PatchClassifier, float]:
    """A classifier trained on new scenes at each step, and its accuracy on unseen scenes."""
    torch.manual_seed(SEEDS[name])
    net = CLASSIFIERS[name]()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        x, y = images_and_labels(batch, 1 + step)
        logits = net(x + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x))
        parts = [cross_entropy(v, y[:, i], label_smoothing=0.05) for i, v in enumerate(logits)]
        torch.stack(parts).sum().backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    net.eval()
    x, y = images_and_labels(4000, 0)
    with torch.no_grad():
        guess = torch.stack([v.argmax(1) for v in net(x)], 1)
    return net, (guess == y).all(1).double().mean().item()


if __name__ == "__main__":
    for name in sys.argv[1:] or CLASSIFIERS:
        net, accuracy = train(name)
        state = save(net.state_dict(), {"accuracy": f"{accuracy:.4f}"})
        (HERE / f"{name}.safetensors").write_bytes(state)
        sys.stdout.write(f"{name}: whole-scene accuracy {accuracy:.4f}\n")
