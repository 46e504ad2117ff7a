"""Few-step students: the generator, its critic, the stock forms, the export."""

from students.critic import Critic
from students.generator import Generator

__all__ = ["Critic", "Generator"]
