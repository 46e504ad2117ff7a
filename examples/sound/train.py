"""Trains the teacher by flow matching, on one core in some minutes: python train.py [STEPS]"""

import sys
import time

import torch
from network import SoundNet
from safetensors.torch import save_file
from sounds import FOLDER, varied

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 6000
BATCH, RATE, DECAY = 32, 2e-3, 0.999


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = SoundNet()
    average = {k: v.clone() for k, v in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.05)
    sounds, labels = varied(8192, seed=0)
    start, total = time.time(), 0.0
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(sounds), (BATCH,))
        x, label = sounds[rows], labels[rows].clone()
        label[torch.rand(BATCH) < 0.1] = network.classes  # no label: for guidance
        t = torch.sigmoid(torch.randn(BATCH))
        noise = torch.randn_like(x)
        x_t = (1 - t[:, None, None]) * x + t[:, None, None] * noise
        loss = (network(x_t, t, {"class_labels": label}) - (noise - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for key, value in network.state_dict().items():
            average[key].lerp_(value, 1 - min(DECAY, step / (step + 9)))
        total += loss.item()
        if step % 250 == 0:
            print(f"{step} loss {total / 250:.4f} {time.time() - start:.0f} s", flush=True)
            total = 0.0
    save_file(average, FOLDER / "teacher.safetensors")
    print(f"{sum(p.numel() for p in network.parameters()):,} weights")


if __name__ == "__main__":
    main()
