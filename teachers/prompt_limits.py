"""Prompts that are cut: which encoders of a pipeline do not read them to their end.

The texts that a pipeline passes to its tokenizers are counted while it encodes, so templates,
instructions and cleaning count too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from teachers.errors import clipped, plural

# Of a tokenizer's arguments, those that shape its output and do not change its tokens.
SHAPING = {"padding", "truncation", "max_length", "return_tensors", "return_length",
           "return_attention_mask", "return_overflowing_tokens"}  # fmt: skip


@dataclass
class Cut:
    """One encoder's limit in tokens, how many prompts were longer, and the first of them."""

    limit: int
    prompts: int = 0
    first: str = ""

    def add(self, other: Cut) -> None:
        """Add another's counts."""
        self.first = self.first or other.first
        self.prompts += other.prompts


@dataclass
class Cuts:
    """How many prompts were encoded, and how many of them were cut, by encoder."""

    read: int = 0
    encoders: dict[str, Cut] = field(default_factory=dict)

    @contextmanager
    def counting(self, pipe: Any, kind: Any, prompts: list[str]) -> Iterator[None]:
        """Count the prompts that a family's pipeline cuts while it encodes them in this context."""
        long: dict[str, tuple[int, set[int]]] = {}  # of each encoder: its limit, which were longer
        tokenizers = {k: v for k, v in vars(pipe).items() if _is_tokenizer(k, v)}
        for name, tokenizer in tokenizers.items():
            # past the pipeline's own __setattr__, which would write to its config
            vars(pipe)[name] = Watched(tokenizer, long, _encoder(pipe, name), kind, pipe)
        try:
            yield
        finally:
            vars(pipe).update(tokenizers)
        self.read += len(prompts)
        for name, (limit, places) in long.items():
            cut = self.encoders.setdefault(name, Cut(limit))
            if places:
                cut.add(Cut(limit, len(places), prompts[min(min(places), len(prompts) - 1)]))

    @classmethod
    def of_tree(cls, tree: dict[str, Any]) -> Cuts:
        """The inverse of `dataclasses.asdict`."""
        return cls(tree["read"], {k: Cut(**v) for k, v in tree["encoders"].items()})

    def add(self, other: Cuts) -> None:
        """Add another's counts."""
        self.read += other.read
        for name, cut in other.encoders.items():
            self.encoders.setdefault(name, Cut(cut.limit)).add(cut)

    def lines(self, where: str, one: str = "prompt") -> list[str]:
        """One line for each encoder that cut a prompt.

        Args:
            where: What the prompts are; it begins each line.
            one: The word for one of them.
        """
        several = sum(cut.limit > 0 for cut in self.encoders.values()) > 1
        return [
            f"{where}: {cut.prompts:,} of {self.read:,} {plural(self.read, one)} "
            f"{'is' if cut.prompts == 1 else 'are'} longer than "
            f"{name if several else 'the encoder'}'s {cut.limit} tokens and "
            f"{'was' if cut.prompts == 1 else 'were'} cut{' there' * several} "
            f"(first: {clipped(cut.first)!r})"
            for name, cut in self.encoders.items()
            if cut.prompts
        ]


class Watched:
    """A tokenizer that notes which texts it cuts; in all else it is the tokenizer that it wraps."""

    def __init__(
        self,
        tokenizer: Any,
        long: dict[str, tuple[int, set[int]]],
        name: str,
        kind: Any,
        pipe: Any,
    ) -> None:
        vars(self).update(_wrapped=tokenizer, _long=long, _name=name, _kind=kind, _pipe=pipe)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped, name, value)

    def __len__(self) -> int:
        return len(self._wrapped)

    def __call__(self, *args: Any, **words: Any) -> Any:
        if words.get("truncation"):
            most = words.get("max_length") or self._wrapped.model_max_length
            limit = self._kind.kept(self._pipe, most)
            plain = {k: v for k, v in words.items() if k not in SHAPING}
            whole = self._wrapped(*args, **plain).input_ids
            rows = [whole] if whole and isinstance(whole[0], int) else whole
            _, places = self._long.setdefault(self._name, (limit, set()))
            places.update(i for i, ids in enumerate(rows) if len(ids) > limit)
        return self._wrapped(*args, **words)


def _is_tokenizer(name: str, value: Any) -> bool:
    return name.startswith("tokenizer") and callable(value)


def _encoder(pipe: Any, name: str) -> str:
    """The encoder that a tokenizer of the pipeline serves, with its class."""
    part = name.replace("tokenizer", "text_encoder")
    return f"{part} ({type(getattr(pipe, part, None)).__name__})"
