"""How rewards join a loss of the student's: as a term of it, or as weights of its samples.

`direct` takes the gradient of the reward through the student's last step (ReFL, arXiv:2304.05977;
RG-LCD, arXiv:2403.11027; DRaFT-1, arXiv:2309.17400): -β R is added to the loss. With `balance` the
reward's gradient has β times the length of the loss's own at the samples, whatever the two measure.

`weighted` takes no gradient of the reward: that of each sample is multiplied by its share of
softmax(R/τ) times the number of samples (the form of f-distill's weights and of DMDR's). It is the
harder to please by pictures that the loss would not make.

`ranked` takes the gradient of a small network of data, the player `ranking`, which learns from the
student's samples to order them as the reward does (the form of TDM-R1's and RG-LCD's surrogates;
the loss of Bradley and Terry 1952). The reward itself needs no gradient.

Of a reward with a `floor` α, in place of R there is -ReLU(α - R): those above it are as good as α
(UniFL, arXiv:2404.05595).

All act where the loss's gradient reaches the samples, so they suit any objective that gives them.
Differs from TDM-R1, of which only weights are public: the network reads x̂ and not the states of the
chain, and pairs are of different prompts, as a batch has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config.schema import RewardSection
from distill.objectives.base import Batch, Loss

# Data (B, ...), their prompts or labels, and whether the gradient is taken -> (B,).
Score = Callable[[Tensor, Sequence[Any], bool], Tensor]

RANKING = "ranking"  # the player that learns to order samples


@dataclass(frozen=True)
class Term:
    """A reward of the loss.

    surrogate: Of a ranked one, a network of data (B, ...) and their condition, (B,).
    """

    section: RewardSection
    score: Score
    surrogate: nn.Module | None = None

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

    @property
    def networks(self) -> nn.ModuleList:
        """Those that learn to order samples."""
        return nn.ModuleList([t.surrogate for t in self.terms if t.surrogate is not None])

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """The sum (B,) of the rewards of data x (B, ...), each times its weight."""
        values = [t.section.weight * self.value(t, x, batch) for t in self.terms]
        return torch.stack(values).sum(0)

    def value(self, term: Term, x: Tensor, batch: Batch) -> Tensor:
        """A reward (B,) of data x (B, ...); without a graph where its gradient is not taken."""
        assert batch.items is not None
        prompts = [self.prompts[i] for i in batch.items.tolist()]
        found = term.score(x, prompts, self.takes_gradients and term.differentiates)
        return found if term.section.floor is None else -F.relu(term.section.floor - found)

    def added(self, loss: Loss, batch: Batch, step: int) -> Loss:
        """The loss with its rewards: terms of its value, and a hook on its samples' gradient."""
        x, value, logs = loss.samples, loss.value, dict(loss.logs)
        assert x is not None
        rewards: list[Tensor] = []
        weights: list[Tensor] = []
        balanced: list[Tensor] = []
        for term in self.terms:
            beta, section = term.weight(step) * x.requires_grad, term.section
            if not beta and term.surrogate is None:
                continue
            with torch.set_grad_enabled(term.differentiates and torch.is_grad_enabled()):
                reward = self.value(term, x if term.differentiates else x.detach(), batch)
            rewards.append(section.weight * reward.detach().mean())
            if term.surrogate is not None:
                found = term.surrogate(x.detach(), batch.cond)
                logs[RANKING] = ranking(found, reward, section.temperature)
                value = value + logs[RANKING]
            if not beta:
                continue
            if section.kind == "weighted":
                weights.append(shares(reward, section.temperature, beta))
            elif section.balance:
                balanced.append(beta * unit(slope(term, reward, x, batch)))
            else:
                value = value - beta * raised(term, reward, x, batch)
        if rewards:
            logs["reward"] = torch.stack(rewards).sum()
        if weights or balanced:
            x.register_hook(lambda grad: steered(grad, weights, balanced))
        return Loss(value, logs, x)


def raised(term: Term, reward: Tensor, x: Tensor, batch: Batch) -> Tensor:
    """A term () whose gradient at x (B, ...) is the mean reward's, or its surrogate's."""
    if term.surrogate is None:
        return reward.mean()
    return ((x - x.detach()) * slope(term, reward, x, batch)).flatten(1).sum(1).mean()


def slope(term: Term, reward: Tensor, x: Tensor, batch: Batch) -> Tensor:
    """The gradient (B, ...) of each sample's reward at x, or of its surrogate, held fixed."""
    if term.surrogate is None:
        return torch.autograd.grad(reward.sum(), x)[0]
    y = x.detach().requires_grad_(True)
    return torch.autograd.grad(term.surrogate(y, batch.cond).sum(), y)[0].to(x.dtype)


def ranking(found: Tensor, reward: Tensor, temperature: float) -> Tensor:
    """How far scores (B,) are from ordering pairs of samples as rewards (B,) do: the mean KL ().

    The chance that one sample is preferred to another is σ((R - R') / τ), and that of scores
    σ(s - s').
    """
    i, j = torch.triu_indices(len(found), len(found), 1, device=found.device)
    given = found.float()
    wanted = torch.sigmoid((reward.float()[i] - reward.float()[j]) / temperature)
    cross = F.binary_cross_entropy_with_logits(given[i] - given[j], wanted, reduction="none")
    return (cross - torch.special.entr(wanted) - torch.special.entr(1 - wanted)).mean()


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
