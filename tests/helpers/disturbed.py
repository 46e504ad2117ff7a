"""Students that are no longer their teachers."""

import torch


def disturbed(student):
    """The student, moved away from its teacher."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return student
