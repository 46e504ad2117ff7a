"""What a critic makes of its features: numbers by hand, and the side that training moves it to."""

import pytest
import torch
from torch import nn

from distill.objectives.losses import critic_loss
from students.critic import Critic, Tokens, image_stream
from teachers.denoiser import Network
from teachers.process import Linear


class Backbone(nn.Module):
    """Two blocks that keep their input's shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1)

    def forward(self, x_t, t):
        return self.second(self.first(x_t))[:, :2]


def made(blocks=("backbone.first", "backbone.second")):
    denoiser = Network(Backbone(), Linear(), "x")
    return denoiser, Critic(denoiser, (2, 4, 4), None, blocks)


def test_a_logit_is_the_mean_over_the_heads():
    _, critic = made()
    with torch.no_grad():
        for head, says in zip(critic.heads, (1.0, 5.0), strict=True):
            last = head[-1]
            last.weight.zero_(), last.bias.fill_(says)
    logits = critic(torch.randn(3, 2, 4, 4), torch.rand(3))
    torch.testing.assert_close(logits, torch.full((3,), 3.0))


def test_each_head_reads_its_own_block_in_the_order_that_they_run_in():
    denoiser, critic = made()
    x, t = torch.randn(3, 2, 4, 4), torch.rand(3)
    first = denoiser.backbone.first(x)
    for got, want in zip(critic.features(x, t), (first, denoiser.backbone.second(first))):
        torch.testing.assert_close(got, want)
    one = [made((name,)) for name in ("backbone.first", "backbone.second")]
    expected = []
    for (other, alone), head in zip(one, critic.heads):
        other.load_state_dict(denoiser.state_dict())
        alone.heads[0].load_state_dict(head.state_dict())
        expected.append(alone(x, t))
    torch.testing.assert_close(critic(x, t), (expected[0] + expected[1]) / 2)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_a_head_of_tokens_starts_as_their_average_whatever_their_number(n):
    torch.manual_seed(0)
    head, x = Tokens(8), torch.randn(2, n, 8)
    expected = head.out(head.read(x).mean(1))
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head(x), head(x.flip(1)))  # their order is of no account


def test_of_two_streams_the_pictures_is_read():
    text, image = torch.zeros(1, 2, 3), torch.ones(1, 4, 3)
    assert image_stream((text, image)) is image
    assert image_stream((image, None)) is image
    assert image_stream(image) is image


def test_training_raises_the_logits_of_data_above_those_of_fakes():
    torch.manual_seed(0)
    _, critic = made()
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    t = torch.full((32,), 0.1)
    data, fakes = torch.randn(2, 32, 2, 4, 4).add(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1))
    for _ in range(20):
        optimizer.zero_grad()
        critic_loss(critic(fakes, t), critic(data, t)).backward()
        optimizer.step()
    assert critic(data, t).mean() > 0.5
    assert critic(fakes, t).mean() < -0.5
