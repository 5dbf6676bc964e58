"""What a finished round of DPO should make somebody look: length, a margin without accuracy, a model far from M_0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LONGER = 1.3  # words of chosen replies for each word of rejected ones
RIGHT = 0.6  # share of pairs in which the chosen reply rose above the rejected one
FAR = 0.5  # KL(M_t || M_0) in nats a token, on validation dialogues
# The limits are ours. DPO learns to write longer replies where chosen ones are (Park et al. 2024), its margin can grow by a few
# pairs alone, and quality falls again once a model is far from where it began (Rafailov et al. 2024, over-optimisation).


def alarms(steps: Sequence[Mapping[str, Any]], ratio: float) -> list[str]:
    """What is worth a look, in words, by the metrics of all steps and the words of chosen replies over those of rejected ones."""
    found = []
    if ratio > LONGER or ratio < 1 / LONGER:
        longer = f"{ratio:.2f} times as long as" if ratio > 1 else f"{ratio:.2f} of the length of"
        found.append(
            f"chosen replies are {longer} rejected ones, which DPO may learn instead; dpo.length_weight, dpo.tail_weight and "
            "dpo.length_normalised correct for it"
        )
    late = steps[-max(1, len(steps) // 4) :]
    margin, right = (sum(float(s[key]) for s in late) / len(late) for key in ("margin", "accuracy"))
    if len(steps) >= 4 and margin > 0 and right < RIGHT:
        found.append(
            f"in the last quarter of the steps the margin is {margin:.3g}, but only {right:.0%} of the pairs are ordered as they "
            "should be (half would be by chance): few pairs make it; look at them, or lower dpo.learning_rate"
        )
    far = [float(s["valid_kl"]) for s in steps if "valid_kl" in s]
    if far and far[-1] > FAR:
        found.append(
            f"the model is {far[-1]:.2f} nats a token from M_0 (KL); raise dpo.beta, lower dpo.learning_rate, or ask for fewer "
            "rounds"
        )
    return found
