"""Texts that a run's model writes for held-out prompts, before and after training."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from hsplit_flwr.data.slots import SlotScore, score_slots
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.generation import generate_texts

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Sample:
    """A prompt to continue before and after training, and what a person wrote."""

    prompt: str
    reference: str


class SampleTexts:
    """What a model makes of prompts, greedily; samples are shown, and of all prompts the slots are counted.

    Args:
        files: of the base model.
        samples: prompts to show with the texts for them.
        prompts: further ones.
    """

    def __init__(self, files: ModelFiles, samples: Sequence[Sample], prompts: Sequence[str]) -> None:
        self._files = files
        self._samples = samples
        self._prompts = [*(sample.prompt for sample in samples), *prompts]
        self._texts: dict[str, list[str]] = {}
        """``before`` and ``after`` training: a text for each of the prompts"""

    def write(self, when: str, model: PreTrainedModel) -> None:
        """Let `model` write the texts, ``before`` or ``after`` it was trained."""
        texts: list[str] = []
        if self._prompts:
            texts = generate_texts(model, self._files.tokenizer(), self._prompts, max_new_tokens=MAX_NEW_TOKENS)
        self._texts[when] = texts

    def slots(self) -> dict[str, SlotScore] | None:
        """``before`` and ``after``, as far as they are: slots that the texts get right; None where nothing counts."""
        scores = {
            when: score_slots(list(zip(self._prompts, texts, strict=True))) for when, texts in self._texts.items()
        }
        return {when: score for when, score in scores.items() if score} or None

    def shown(self) -> tuple[dict[str, str], ...]:
        """The samples with their texts."""
        before = self._texts["before"]
        after = self._texts.get("after", before)
        return tuple(
            {"prompt": sample.prompt, "reference": sample.reference, "before": then, "after": now}
            for sample, then, now in zip(self._samples, before, after, strict=False)
        )

    def lines(self) -> list[str]:
        """The samples for the log, without what people wrote."""
        lines = []
        for one in self.shown():
            lines += [f"prompt  {one['prompt']}", f"before  {one['before']}", f"after   {one['after']}", ""]
        return lines
