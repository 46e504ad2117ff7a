"""The pipeline of several students: each prompt or label is drawn by the one that it belongs to.

It leaves with the students, as one file that needs diffusers and nothing of ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from students.routing.rule import expert_of


class RoutedPipeline(DiffusionPipeline):
    """Students of one teacher, each for a part of its prompts or labels.

    A picture depends on its prompt and its generator alone, not on what else is in the batch.

    Args:
        rule: As `expert_of` takes it.
        experts: The students' pipelines, by `expert_0` and so on.
    """

    def __init__(self, rule: dict, **experts: DiffusionPipeline) -> None:
        super().__init__()
        self.register_modules(**experts)
        self.register_to_config(rule=rule)

    @property
    def experts(self) -> list[Any]:
        """The students' pipelines, in the order of the rule's parts."""
        known: Any = self.config["rule"]
        return [getattr(self, f"expert_{number}") for number in range(len(known["parts"]))]

    def to(self, *args: Any, **kwargs: Any) -> RoutedPipeline:
        """Move all students; arguments as of any pipeline."""
        for expert in self.experts:
            expert.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        return self.experts[0].device

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        for expert in self.experts:
            expert.set_progress_bar_config(**kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        class_labels: Any = None,
        num_inference_steps: int = 1,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **arguments: Any,
    ) -> Any:
        """Pictures of prompts or of labels, in their order.

        Args:
            prompt, class_labels: One of the two, alone or in a list.
            generator: One for each picture, or one that their seeds are drawn from.
            arguments: Others of the students' pipelines; each has the same for all pictures.
        """
        if (prompt is None) == (class_labels is None):
            raise ValueError("give prompt or class_labels, one of the two")
        name, given = ("prompt", prompt) if class_labels is None else ("class_labels", class_labels)
        given = [given] if isinstance(given, str | int) else list(given)
        rule: Any = self.config["rule"]
        chosen = [expert_of(v, rule) for v in given]
        generators = generators_of(generator, len(given))
        pictures: list[Any] = [None] * len(given)
        for number in sorted(set(chosen)):
            expert, places = self.experts[number], [i for i, k in enumerate(chosen) if k == number]
            own: dict[str, Any] = {name: [given[i] for i in places]}
            if "batch_size" in inspect.signature(expert.__call__).parameters:
                own["batch_size"] = len(places)
            made = expert(
                **own,
                num_inference_steps=num_inference_steps,
                generator=[generators[i] for i in places],
                output_type=output_type,
                **arguments,
            )
            for place, picture in zip(places, next(iter(made.values())), strict=True):
                pictures[place] = picture
        together: Any = pictures
        if output_type in ("pt", "latent"):
            together = torch.stack(pictures)
        elif output_type == "np":
            together = torch.stack([torch.from_numpy(v) for v in pictures]).numpy()
        return ImagePipelineOutput(images=together) if return_dict else (together,)


def generators_of(generator: Any, count: int) -> Sequence[torch.Generator]:
    """A generator of noise for each picture.

    Args:
        generator: So many of them; or one, or None, from which their seeds are drawn.

    Raises:
        ValueError: there are more or fewer.
    """
    if isinstance(generator, list | tuple):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} pictures; give one for each")
        return generator
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**62, (count,), generator=generator, device=device)
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]


def named(count: int) -> None:
    """Give the pipeline a parameter for each student: diffusers reads a pipeline's parts off the
    signature, and its settings are parameters with a default."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ("self", *(f"expert_{number}" for number in range(count)))
    parameters = [inspect.Parameter(name, kind) for name in names]
    parameters.append(inspect.Parameter("rule", kind, default={}))
    start: Any = RoutedPipeline.__init__
    start.__signature__ = inspect.Signature(parameters)
