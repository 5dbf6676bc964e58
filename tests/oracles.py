"""What several test files compare with: the same model in torch, log-probs by torch, real ESConv chats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from conftest import read_dialogues
from flax import nnx
from transformers import AutoModelForCausalLM, AutoTokenizer

from esjax.corpus.dialogue import Dialogue
from esjax.model.decoder import Decoder
from esjax.model.lora import Adapter
from esjax.model.weights import Backbone, bind
from esjax.rows import Rows, pack, stack, trunk

BARE: Adapter = nnx.State({})  # no adapter at all
torch.set_num_threads(1)  # with two, torch waits at every barrier for a core that another process has: ten times slower


def torch_model(folder: Path) -> Any:
    """The oracle: transformers' own model of a Hugging Face folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def torch_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of one unpadded sequence."""
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.tensor([list(tokens)])).logits[0].float())


def torch_logprobs(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> np.ndarray:
    """Log-probabilities [n] of the reply's tokens after the prompt: log_softmax of the logits, gathered."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
        return np.asarray(torch.log_softmax(logits, -1).gather(-1, torch.tensor(list(reply))[:, None])[:, 0])


def torch_score(folder: Path, chat: Sequence[dict[str, str]]) -> tuple[list[float], int]:
    """Log-probs of the tokens of a chat's last message, its end among them, by transformers' own template and model; and
    how many tokens the chat has, up to that end."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt, whole = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=more, return_dict=True)["input_ids"]
        for messages, more in ((chat[:-1], True), (chat, False))
    )
    whole = whole[: whole.index(tokenizer.eos_token_id, len(prompt)) + 1]
    return torch_logprobs(torch_model(folder), prompt, whole[len(prompt) :]).tolist(), len(whole)


class Ours:
    """A backbone's jitted forward pass, compiled once for each shape of rows."""

    def __init__(self, backbone: Backbone) -> None:
        def forward(adapter: Adapter, base: nnx.State, rows: Rows) -> jax.Array:
            model = bind(backbone.definition, adapter, base)
            return model.logits(model(rows, backbone.execution))

        self.backbone, self._program = backbone, jax.jit(forward)

    def logits(self, rows: Rows, adapter: Adapter = BARE, base: nnx.State | None = None) -> np.ndarray:
        """Logits [B, T, V] of rows [B, T], with another ``base`` where one is given."""
        return np.asarray(self._program(adapter, self.backbone.base if base is None else base, rows))

    def sequence(
        self, tokens: Sequence[int], length: int, adapter: Adapter = BARE, base: nnx.State | None = None
    ) -> np.ndarray:
        """Logits [T, V] of one sequence, computed in a row padded to ``length``."""
        return self.logits(stack([pack([trunk(tokens)], length)]), adapter, base)[0, : len(tokens)]


def perturbed(backbone: Backbone, layer: int, linear: str = "down_proj", amount: float = 0.05) -> Backbone:
    """The backbone with ``amount`` added to one layer's kernel: what an import that went wrong would look like."""
    flat: Any = dict(nnx.to_flat_state(backbone.base))
    path = ("layers", linear, "kernel")
    flat[path] = flat[path].replace(flat[path][...].at[layer].add(amount))
    return replace(backbone, base=nnx.from_flat_state(flat))


def random_adapter(backbone: Backbone, seed: int, size: float = 0.05) -> Adapter:
    """An adapter whose A and B are both random, so that it changes the model and every matrix has a gradient."""
    fresh = backbone.fresh_adapter(seed)
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, x.shape, x.dtype) * size for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def model_of(backbone: Backbone, adapter: Adapter = BARE) -> Decoder:
    """The callable model."""
    return bind(backbone.definition, adapter, backbone.base)


def worst(a: Any, b: Any) -> float:
    """The largest absolute difference; NaN where any value is NaN, so that no comparison with it holds."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def real_dialogues(esconv: Path) -> list[Dialogue]:
    """ESConv's validation dialogues."""
    return read_dialogues("esconv", str(esconv / "valid.jsonl"))
