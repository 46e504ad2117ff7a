"""Train a digits classifier: `python -m eval.digits.train [NAME]`, a minute on two CPU cores."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save
from torch.nn.functional import cross_entropy

from eval.digits import CLASSIFIERS, HERE, Classifier, DenseClassifier, data, held_out

SEEDS = {"classifier": 0, "dense": 1}


def train(
    name: str = "classifier", epochs: int = 100, batch: int = 128
) -> tuple[Classifier | DenseClassifier, float]:
    """A classifier trained on four fifths of the digits, and its accuracy on the last fifth."""
    torch.manual_seed(SEEDS[name])
    images, labels = data()
    test = held_out(len(images))
    net, x, y = CLASSIFIERS[name](), images[~test], labels[~test]
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=epochs * (len(x) // batch)
    )
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
            noisy = x[index] + 0.1 * torch.randn_like(x[index])
            cross_entropy(net(noisy), y[index], label_smoothing=0.05).backward()
            optimizer.step(), optimizer.zero_grad(), schedule.step()
    net.eval()
    with torch.no_grad():
        accuracy = (net(images[test]).argmax(1) == labels[test]).double().mean().item()
    return net, accuracy


if __name__ == "__main__":
    for name in sys.argv[1:] or CLASSIFIERS:
        net, accuracy = train(name)
        state = save(net.state_dict(), {"accuracy": f"{accuracy:.4f}"})
        (HERE / f"{name}.safetensors").write_bytes(state)
        sys.stdout.write(f"{name}: held-out accuracy {accuracy:.4f}\n")
