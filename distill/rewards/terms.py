"""How rewards join a loss of the student's: as a term of it, or as weights of its samples.

`direct` takes the gradient of the reward through the student's last step (ReFL, arXiv:2304.05977;
RG-LCD, arXiv:2403.11027; DRaFT-1, arXiv:2309.17400): -β R is added to the loss. With `balance` the
reward's gradient has β times the length of the loss's own at the samples, whatever the two measure.

`weighted` takes no gradient of the reward: that of each sample is multiplied by its share of
softmax(R/τ) times the number of samples (the form of f-distill's weights and of DMDR's). It is the
harder to please by pictures that the loss would not make.

Both act where the loss's gradient reaches the samples, so they suit any objective that gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.config.schema import RewardSection
from distill.objectives.base import Batch, Loss

# Data (B, ...), their prompts or labels, and whether the gradient is taken -> (B,).
Score = Callable[[Tensor, Sequence[Any], bool], Tensor]


@dataclass(frozen=True)
class Term:
    """A reward of the loss."""

    section: RewardSection
    score: Score

    @property
    def differentiates(self) -> bool:
        return self.section.kind == "direct"

    def weight(self, step: int) -> float:
        """β in this step of training."""
        age = step - self.section.begins
        if age < 0:
            return 0.0
        return self.section.weight * min(1.0, (age + 1) / (self.section.warmup + 1))


class Rewards:
    """The rewards of a loss, for the prompts of a data source.

    Args:
        prompts: Of each item of the source.
        takes_gradients: Whether the loss takes those of direct rewards.
    """

    def __init__(
        self, terms: Sequence[Term], prompts: Sequence[Any], takes_gradients: bool = True
    ) -> None:
        self.terms, self.prompts, self.takes_gradients = tuple(terms), prompts, takes_gradients

    @property
    def differentiates(self) -> bool:
        """Whether the gradient of one of them is taken."""
        return self.takes_gradients and any(t.differentiates for t in self.terms)

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """The sum (B,) of the rewards of data x (B, ...), each times its weight."""
        values = [t.section.weight * self.value(t, x, batch) for t in self.terms]
        return torch.stack(values).sum(0)

    def value(self, term: Term, x: Tensor, batch: Batch) -> Tensor:
        """A reward (B,) of data x (B, ...); without a graph where its gradient is not taken."""
        assert batch.items is not None
        prompts = [self.prompts[i] for i in batch.items.tolist()]
        return term.score(x, prompts, self.takes_gradients and term.differentiates)

    def added(self, loss: Loss, batch: Batch, step: int) -> Loss:
        """The loss with its rewards: a term of its value, or a hook on its samples' gradient."""
        x, value, logs = loss.samples, loss.value, dict(loss.logs)
        assert x is not None
        rewards: list[Tensor] = []
        weights: list[Tensor] = []
        balanced: list[Tensor] = []
        for term in self.terms:
            beta = term.weight(step)
            if not beta:
                continue
            if not term.differentiates:
                with torch.no_grad():
                    reward = self.value(term, x.detach(), batch)
                weights.append(shares(reward, term.section.temperature, beta))
            else:
                reward = self.value(term, x, batch)
                if term.section.balance:
                    balanced.append(beta * unit(torch.autograd.grad(reward.sum(), x)[0]))
                else:
                    value = value - beta * reward.mean()
            rewards.append(term.section.weight * reward.detach().mean())
        if rewards:
            logs["reward"] = torch.stack(rewards).sum()
        if weights or balanced:
            x.register_hook(lambda grad: steered(grad, weights, balanced))
        return Loss(value, logs, x)


def shares(reward: Tensor, temperature: float, strength: float) -> Tensor:
    """Each sample's weight (B,) by its reward (B,), of mean 1; `strength` is its power.

    Args:
        temperature: τ, in the reward's own units.
    """
    return len(reward) * (strength * reward.double() / temperature).softmax(0).to(reward.dtype)


def unit(grad: Tensor) -> Tensor:
    """A gradient (B, ...) over the mean length of its samples'; zero where all are zero."""
    length = lengths(grad).mean()
    return torch.where(length > 0, grad / length.clamp(min=torch.finfo(grad.dtype).tiny), 0.0)


def steered(grad: Tensor, weights: Sequence[Tensor], balanced: Sequence[Tensor]) -> Tensor:
    """The gradient (B, ...) of a loss at its samples, weighted and with those of rewards.

    Args:
        weights: Of samples, (B,) each.
        balanced: Gradients of rewards (B, ...), whose lengths are shares of the loss's.
    """
    for weight in weights:
        grad = grad * weight.reshape(-1, *[1] * (grad.ndim - 1)).to(grad.dtype)
    length = lengths(grad).mean()
    return grad - sum((length * g.to(grad.dtype) for g in balanced), torch.zeros_like(grad))


def lengths(grad: Tensor) -> Tensor:
    """The norm of each sample's gradient, (B,)."""
    return grad.flatten(1).norm(dim=1)
