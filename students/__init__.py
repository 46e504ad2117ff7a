"""Few-step students: the generator, its critic, adapters, forms of students."""

from students.critic import Critic
from students.generator import Generator

__all__ = ["Critic", "Generator"]
