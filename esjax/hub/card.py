"""A model card: what a model is made of and how, what was measured, what it is for and what not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

# Formats of published corpora whose licences forbid commercial use; what is trained on them inherits that.
NON_COMMERCIAL = {
    "esconv": "ESConv (CC BY-NC 4.0)",
    "pesconv": "PESConv, made from ESConv (CC BY-NC 4.0)",
    "augesc": "AugESC (CC BY-NC 4.0)",
    "empathetic": "EmpatheticDialogues (CC BY-NC 4.0)",
}


@dataclass(frozen=True)
class Card:
    """What a card says. ``scores`` are records of the run's
    evaluation, one a metric and model; ``settings`` a tree to be shown as YAML."""

    name: str  # M_2
    form: str  # merged, peft, or the name of a GGUF file
    base: str | None  # the hub's name of the backbone
    backbone: str  # how the settings name it
    system: str  # the system message that it was opened with
    version: str
    rounds: int | None = None  # of self-improvement that the model went through; None where it was trained elsewhere
    data: Mapping[str, str] = field(default_factory=dict)  # what for -> source
    formats: Sequence[str] = ()  # of the corpora
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Sequence[Mapping[str, Any]] = ()


def card_text(card: Card) -> str:
    """The card as README.md, with the metadata that the Hugging Face hub reads."""
    from huggingface_hub import ModelCardData

    restricted = [NON_COMMERCIAL[name] for name in NON_COMMERCIAL if name in card.formats]
    licence: dict[str, Any] = (
        {"license": "cc-by-nc-4.0"} if restricted else {"license": "other", "license_name": "of-base-and-data"}
    )
    data = ModelCardData(
        **licence,
        language="en",
        library_name={"peft": "peft", "merged": "transformers"}.get(card.form, "gguf"),
        pipeline_tag="text-generation",
        base_model=card.base,
        tags=["emotional-support", "dpo", "esjax"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {card.name}: a model for emotional support",
        _about(card),
        _use(card),
        _data(card.data),
        _licence(restricted),
        _results(card.scores),
        USES,
        _settings(card),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _data(data: Mapping[str, str]) -> str:
    if not data:
        return "## Data\n\nIt is not known here what this model was trained on."
    return "## Data\n\n" + "\n".join(f"- {what}: `{source}`" for what, source in data.items())


def _settings(card: Card) -> str:
    text = f"## Settings\n\nWritten by esjax {card.version}."
    if not card.settings:
        return text
    return f"{text}\n\n```yaml\n{yaml.safe_dump(dict(card.settings), sort_keys=False)}```"


def _about(card: Card) -> str:
    kind = "an adapter on" if card.form == "peft" else "made from"
    if card.rounds is None:
        return (
            f"This model is {kind} `{card.base or card.backbone}`. It was trained elsewhere, and only written by esjax."
        )
    steps = (
        "It was fine-tuned on emotional-support dialogues (supporter turns alone are targets)"
        if card.rounds == 0
        else f"It was fine-tuned on emotional-support dialogues and then went through {card.rounds} round"
        f"{'s' if card.rounds > 1 else ''} of self-improvement: it drafted a reply, reflected on the seeker's profile, emotional "
        "state and situation, refined the reply, and was trained by direct preference optimisation to prefer the refined reply "
        "given the conversation alone"
    )
    return (
        f'This model is {kind} `{card.base or card.backbone}`. {steps}. The method is that of Ye et al., "From Generic Empathy '
        'to Personalized Emotional Support: A Self-Evolution Framework for User Preference Alignment" (Findings of EMNLP 2025, '
        "arXiv 2505.16610); hyper-parameters, prompts and filters are esjax's own."
    )


def _use(card: Card) -> str:
    if card.form.endswith(".gguf"):
        told = f" -sys {json.dumps(card.system)}" if card.system else ""
        text = f"## Use\n\n```sh\nllama-cli -m {card.form}{told}\n```\n\nOllama takes it by `FROM ./{card.form}` in a Modelfile."
        return text + ("\n\nThe system message is the one of training." if card.system else "")
    opened = "AutoPeftModelForCausalLM" if card.form == "peft" else "AutoModelForCausalLM"
    library = "peft" if card.form == "peft" else "transformers"
    system = f'    {{"role": "system", "content": {card.system!r}}},\n' if card.system else ""
    return (
        "## Use\n\n```python\n"
        f"from {library} import {opened}\nfrom transformers import AutoTokenizer\n\n"
        f'model, tokenizer = {opened}.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n'
        f'chat = [\n{system}    {{"role": "user", "content": "I could not sleep again."}},\n]\n'
        'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))\n```"
        + ("\n\nThe system message is the one of training." if card.system else "")
    )


def _licence(restricted: Sequence[str]) -> str:
    if not restricted:
        return (
            "## Licence\n\nThe licences of the backbone and of the data above hold for these weights; state them before you "
            "share them."
        )
    return (
        f"## Licence\n\nTrained on {', '.join(restricted)}: these weights are for non-commercial use only, whatever the "
        "backbone's licence allows. The backbone's licence holds as well."
    )


def _results(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return "## Results\n\nNothing was measured in the run that made this model."
    models = list(dict.fromkeys(str(r["model"]) for r in records))
    cells: dict[str, dict[str, str]] = {}
    for r in records:
        interval = "" if r["low"] is None or r["high"] is None else f" [{r['low']:.3f}, {r['high']:.3f}]"
        label = f"{r['label']} ({r['better']} is better)" if r["better"] != "neither" else r["label"]
        cells.setdefault(label, {})[str(r["model"])] = "-" if r["value"] is None else f"{r['value']:.3f}{interval}"
    head = "| | " + " | ".join(models) + " |\n|---|" + "---|" * len(models)
    lines = [f"| {label} | " + " | ".join(row.get(m, "-") for m in models) + " |" for label, row in cells.items()]
    return (
        f"## Results\n\nOn {records[0]['dialogues']} held-out dialogues, {records[0]['contexts']} replies a model, with 95% "
        "intervals over dialogues. None of these numbers says that a reply helps anybody.\n\n"
        + "\n".join([head, *lines])
    )


USES = """## Intended and excluded uses

For research on how language models can give emotional support: studying, comparing and improving such models, with people who
know that they talk to a program.

Not for therapy, diagnosis or crisis care, and not for people in danger: the model was trained on no conversation in which
somebody shows signs of crisis, recognises none reliably, and must not stand between a person and help. Not to be presented as a
human being. It can be wrong, repeat what a user says about himself, and give advice that harms; a person has to be responsible
for each use with others."""
