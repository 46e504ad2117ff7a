"""Critics: small heads on a denoiser's features that tell generated samples from data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from teachers import conditions
from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError
from teachers.features import blocks_of, tapped
from teachers.process import Process
from teachers.teacher import Codec

KEY = "critic.blocks"  # the recipe key, which begins error messages
NOISIER, NOISIER_TIME = "noisier", "noisier_time"  # entries of a condition: see `PairCritic`


class Critic(nn.Module):
    """Logits (B,), high for data, from the outputs of a denoiser's blocks (arXiv:2405.14867).

    The critic uses the denoiser and does not own it: the denoiser's weights are not among the
    critic's parameters. The denoiser's forward pass stops after the last of the blocks. `source`
    says whose features they are, where these are recorded.

    Args:
        denoiser: Whose blocks; usually the fake score, which then learns from the critic too.
        shape: Of one datum, without the batch.
        cond: A condition of batch size 1, with which the denoiser runs once to show the shapes of
            its blocks' outputs.
        blocks: Names of modules, as the denoiser's `named_modules()` gives them; those of the
            shared network where the denoiser is an adapter on one.

    Raises:
        UserError: no block is named, one is named twice, is missing or compiled, or returns
            neither a feature map nor tokens.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        cond: Cond = None,
        blocks: Sequence[str] = ("backbone.mid_block",),
    ) -> None:
        super().__init__()
        if not blocks:
            raise UserError(f"{KEY}: it is empty; name at least one block")
        if repeated := [b for b in blocks if blocks.count(b) > 1]:
            raise UserError(f"{KEY}: {repeated[0]!r} is there twice; name each block once")
        blocks_of(denoiser, blocks, KEY)
        self.blocks, self.source = tuple(blocks), "teacher"
        self._denoiser = (denoiser,)  # in a tuple: not a submodule
        shared = denoiser.inner_denoiser or denoiser  # an adapter may have no weights of its own
        first = next(shared.parameters(), None)
        x = torch.zeros(1, *shape, device=None if first is None else first.device)
        with torch.no_grad():
            outputs = self._outputs(x, x.new_ones(1), conditions.moved(cond, x.device))
        modules = blocks_of(denoiser, blocks, KEY)
        vectors = len(shape) == 1 or isinstance(denoiser, ImageFeatures)
        heads = [
            head_for(name, f, channels_first(modules[name]), vectors) for name, f in outputs.items()
        ]
        self.heads = nn.ModuleList(heads).to(x.device)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> list[Tensor]:
        """The blocks' outputs, (B, C, H, W) or tokens (B, N, C), in the order they run in.

        Of a block with a text stream and an image stream, this is the image stream.
        """
        return list(self._outputs(x_t, t, cond).values())

    def _outputs(self, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        (denoiser,) = self._denoiser
        with tapped(denoiser, self.blocks, KEY, stop=True) as outputs:
            denoiser(x_t, t, cond)
        return {name: image_stream(output) for name, output in outputs.items()}

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Logits (B,) of noisy samples x_t (B, ...) at times t (B,); the mean over heads."""
        return self.read(self.features(x_t, t, cond))

    def read(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B,) of the blocks' outputs, in the order of `features`."""
        logits = [h(f.float()).flatten() for h, f in zip(self.heads, features, strict=True)]
        return torch.stack(logits).mean(0).float()


class PairCritic(Critic):
    """A critic that reads a state of a chain and the noisier one before it, as DDGAN's does.

    The condition holds the other state, `NOISIER` (B, ...), and its times, `NOISIER_TIME` (B,).
    Each head reads the block's features of both, channels beside channels (arXiv:2112.07804).
    """

    def _outputs(self, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        other = cond or {}
        before = other.get(NOISIER, x_t), other.get(NOISIER_TIME, t)
        own = super()._outputs(x_t, t, cond)
        (denoiser,) = self._denoiser
        modules = blocks_of(denoiser, self.blocks, KEY)
        return {
            name: torch.cat([own[name], value], -1 if is_tokens(value, modules[name]) else 1)
            for name, value in super()._outputs(*before, cond).items()
        }


class HeldWeights(Denoiser):
    """A network that is not learning by this call, though gradients reach what it reads.

    A critic on the student's own features reads them through it: a student whose weights followed
    the critic's gradient there would change the features instead of its samples.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self._denoiser = (denoiser,)  # in a tuple: not a submodule
        self.process = denoiser.process

    @property
    def inner_denoiser(self) -> Denoiser:
        return self._denoiser[0]

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        (network,) = self._denoiser
        learning = [p for p in network.parameters() if p.requires_grad]
        for p in learning:
            p.requires_grad_(False)
        try:
            return network(x_t, t, cond, s)
        finally:
            for p in learning:
                p.requires_grad_(True)


class ImageFeatures(Denoiser):
    """A frozen network of images in a denoiser's place, for a critic to read: it has no x̂.

    It reads x_t as images in [-1, 1], with their graph, and neither times nor conditions.

    Args:
        encoder: A network of images (B, C, H, W).
        codec: That of the teacher, which leads from data to images.
        process: The teacher's.
    """

    def __init__(self, encoder: nn.Module, codec: Codec, process: Process) -> None:
        super().__init__()
        self.encoder, self.codec, self.process = encoder, codec, process
        self.requires_grad_(False).eval()

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        if self.codec.vae is not None:
            self.codec.vae.requires_grad_(False).to(x_t.device)
        return self.encoder.to(x_t.device)(self.codec.decode_with_graph(x_t))


class SANCritic(Critic):
    """A critic whose heads end in unit vectors, as SAN's do (Takida et al. 2023, arXiv:2301.12811).

    In training it says two things: the logits by the heads' features along fixed directions, and
    those by the directions with fixed features. Both have the same values.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        cond: Cond = None,
        blocks: Sequence[str] = ("backbone.mid_block",),
    ) -> None:
        super().__init__(denoiser, shape, cond, blocks)
        self.directions = nn.ModuleList([Direction(without_last(head)) for head in self.heads])

    def read(self, features: Sequence[Tensor]) -> Tensor:
        pairs = zip(self.directions, self.vectors(features), strict=True)
        return torch.stack([direction(h) for direction, h in pairs]).mean(0).float()

    def apart(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B,) through which the features learn, and (B,) through which directions do."""
        pairs = zip(self.directions, self.vectors(features), strict=True)
        logits = [direction.apart(h) for direction, h in pairs]  # pyright: ignore
        return tuple(torch.stack(v).mean(0).float() for v in zip(*logits))  # pyright: ignore

    def vectors(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What each head hands to its direction, (B, C)."""
        return [h(f.float()).flatten(1) for h, f in zip(self.heads, features, strict=True)]

    def renormalise(self) -> None:
        """Make the directions unit vectors again, in place, after a step of the optimiser."""
        for direction in self.directions:
            assert isinstance(direction, Direction)
            direction.renormalise()


class Direction(nn.Module):
    """A head's last layer: s ⟨h + b, ω⟩ with |ω| = 1, and a scale s; the bias b is the feature's.

    Args:
        layer: A layer of one output, from whose weights it starts.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        weight = layer.weight.detach().flatten()
        self.scale = nn.Parameter(weight.norm())
        self.weight = nn.Parameter(nn.functional.normalize(weight, dim=0))
        self.bias = nn.Parameter(torch.zeros_like(weight))

    def forward(self, h: Tensor) -> Tensor:
        """The logit (B,) of h (B, C)."""
        return self.scale * ((h + self.bias) @ self.unit)

    def apart(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The logit with a gradient to h, bias and scale; and with one to the direction alone."""
        h = h + self.bias
        return self.scale * (h @ self.unit.detach()), self.scale.detach() * (h.detach() @ self.unit)

    @property
    def unit(self) -> Tensor:
        """ω (C,): its gradient is along the sphere."""
        return nn.functional.normalize(self.weight, dim=0)

    @torch.no_grad()
    def renormalise(self) -> None:
        self.weight.copy_(self.unit)


def without_last(head: nn.Module) -> Any:
    """Take a head's last layer away, so that the head returns what that layer read."""
    owner = head[-1] if isinstance(head, nn.Sequential) and isinstance(head[-1], Tokens) else head
    if isinstance(owner, Tokens):
        layer, owner.out = owner.out, nn.Identity()
    else:
        assert isinstance(owner, Head)
        layer, owner[-1] = owner[-1], nn.Identity()
    return layer


class FeatureMean(Critic):
    """A critic without weights: the mean over channels of a block's output (arXiv:2410.14919).

    Logits are (B, N), one for each place of the feature maps, or each token, of the blocks. What
    tells fakes from data is the denoiser itself, so its weights learn from the critic's loss.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        cond: Cond = None,
        blocks: Sequence[str] = ("backbone.mid_block",),
    ) -> None:
        super().__init__(denoiser, shape, cond, blocks)
        self.heads = nn.ModuleList()
        modules = blocks_of(denoiser, blocks, KEY)
        self.channels_first = {name: channels_first(module) for name, module in modules.items()}

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Logits (B, N) of noisy samples x_t (B, ...) at times t (B,)."""
        return self.logits(self._outputs(x_t, t, cond))

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        """The denoiser's x̂ (B, ...) and the logits (B, N), from one pass of the denoiser."""
        (denoiser,) = self._denoiser
        with tapped(denoiser, self.blocks, KEY) as outputs:
            x = denoiser(x_t, t, cond)
        return x, self.logits({name: image_stream(v) for name, v in outputs.items()})

    def logits(self, outputs: dict[str, Any]) -> Tensor:
        """The means over channels of the blocks' outputs, by name: (B, N)."""
        means = []
        for name, feature in outputs.items():
            tokens = feature.ndim == 3 and not self.channels_first[name]
            means.append(feature.float().mean(-1 if tokens else 1).reshape(len(feature), -1))
        return torch.cat(means, 1)


def head_for(
    name: str, feature: Any, channels_first: bool = False, vectors: bool = False
) -> nn.Module:
    """A new head for a block's output.

    Args:
        channels_first: An output of three dimensions is (B, C, L), and not tokens (B, N, C).
        vectors: Outputs (B, C) are features, as data are vectors; else they embed a time.

    Raises:
        UserError: the output is of another kind.
    """
    if isinstance(feature, Tensor) and feature.ndim == 3 and not channels_first:
        return Tokens(feature.shape[-1])
    if isinstance(feature, Tensor) and feature.ndim == 4:
        return head(feature.shape[1], (feature.shape[2], feature.shape[3]))
    if isinstance(feature, Tensor) and feature.ndim in ((2, 3, 5) if vectors else (3, 5)):
        return nn.Sequential(Places(), Tokens(feature.shape[1]))
    raise UserError(
        f"{KEY}: block {name!r} returns neither a feature map (B, C, H, W) nor tokens (B, N, C); "
        "name another block"
    )


def is_tokens(feature: Tensor, block: nn.Module) -> bool:
    """Whether a block's output is tokens (B, N, C), and not a map whose channels come first."""
    return feature.ndim == 3 and not channels_first(block)


def channels_first(block: nn.Module) -> bool:
    """Whether a block works on sequences (B, C, L), as convolutions of one dimension do."""
    return any(isinstance(module, nn.Conv1d) for module in block.modules())


class Places(nn.Module):
    """The places of a map of any dimension as tokens: (B, C), (B, C, L), … to (B, N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-1).flatten(2).transpose(1, 2)


class Head(nn.Sequential):
    """One logit (B, 1, 1, 1) of feature maps (B, C, H, W): halve them, then read the whole map.

    Maps of other sizes, as buckets have, are resized to `size` before the layer that reads the
    whole map: cells are averaged or repeated.

    Args:
        size: Height and width that the layer which reads the whole map expects.
        last: The index of that layer.
    """

    def __init__(self, layers: Sequence[nn.Module], size: tuple[int, int], last: int) -> None:
        super().__init__(*layers)
        self.size, self.last = size, last

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self):
            height, width = x.shape[-2:]
            if i < self.last:
                wanted = (max(2, height), max(2, width))  # or there is nothing to halve
            else:
                wanted = self.size if i == self.last else (height, width)
            if wanted != (height, width):
                x = nn.functional.adaptive_avg_pool2d(x, wanted)
            x = layer(x)
        return x


def head(channels: int, size: tuple[int, int]) -> Head:
    """A head that halves (B, C, *size) to at most 4×4, then reads one logit from the whole map."""
    layers: list[nn.Module] = []
    height, width = size
    while max(height, width) > 4:
        layers += [nn.Conv2d(channels, channels, 4, 2, 1), *block(channels)]
        height, width = max(1, height // 2), max(1, width // 2)
    last = len(layers)
    layers += [nn.Conv2d(channels, channels, (height, width)), *block(channels)]
    return Head([*layers, nn.Conv2d(channels, 1, 1)], (height, width), last)


def image_stream(output: Any) -> Any:
    """The image stream of a block's output: the last tensor, as the text stream comes first."""
    if not isinstance(output, tuple):
        return output
    return next((o for o in reversed(output) if isinstance(o, Tensor)), None)


class Tokens(nn.Module):
    """One logit (B, 1) of any number of tokens (B, N, C).

    Each token is read on its own; the results are averaged with learned weights, equal at first.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.read = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU(),
            nn.Linear(channels, channels), nn.SiLU(),
        )  # fmt: skip
        self.attend = nn.Linear(channels, 1, bias=False)
        nn.init.zeros_(self.attend.weight)
        self.out: nn.Module = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        return self.out((self.attend(x).softmax(1) * x).sum(1))


def block(channels: int) -> tuple[nn.Module, nn.Module]:
    """Group normalisation in groups of 16 channels or more, then SiLU.

    The last normalisation sees one pixel, which groups of one channel would turn into zeros.
    """
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % (16 * g) == 0 or g == 1)
    return nn.GroupNorm(groups, channels), nn.SiLU()
