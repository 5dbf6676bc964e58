"""Sentence embeddings by a Hugging Face folder of BERT's kind, computed in JAX."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from esjax.errors import InputError
from esjax.hub.shards import ShardReader

AT_ONCE = 32  # texts; with LENGTHS few programs are compiled
LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}
FIXED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


class Embedder:
    """Texts to unit vectors: the mean of a BERT's last states over a text's tokens, or the first token's, as the folder says."""

    def __init__(self, folder: Path) -> None:
        """Read a folder. Raises InputError naming what is not supported or missing."""
        from transformers import AutoTokenizer

        self.config = _json(folder / "config.json")
        if self.config.get("model_type") != "bert" or self.config.get("hidden_act") not in ACTIVATIONS:
            raise InputError(
                f"{folder / 'config.json'}: model_type={self.config.get('model_type')!r}, "
                f"hidden_act={self.config.get('hidden_act')!r}; allowed: bert with {' or '.join(ACTIVATIONS)}"
            )
        for key, allowed in FIXED.items():
            if self.config.get(key, allowed) != allowed:
                raise InputError(
                    f"{folder / 'config.json'}: {key}={self.config[key]!r} is not supported; allowed: {allowed!r}"
                )
        pooling = folder / "1_Pooling" / "config.json"
        how = _json(pooling) if pooling.exists() else {"pooling_mode_mean_tokens": True}
        modes = sorted(key for key, value in how.items() if key.startswith("pooling_mode_") and value is True)
        if modes not in (["pooling_mode_mean_tokens"], ["pooling_mode_cls_token"]):
            raise InputError(
                f"{pooling}: {', '.join(modes) or 'no pooling mode'}; allowed: mean_tokens or cls_token alone"
            )
        c = self.config
        known = c["num_hidden_layers"], c["num_attention_heads"], c["hidden_act"], c["layer_norm_eps"]
        self.sizes = _Sizes(*known, modes == ["pooling_mode_mean_tokens"])
        limit = folder / "sentence_bert_config.json"
        most = _json(limit).get("max_seq_length") if limit.exists() else None
        self.longest = min(int(most or 512), int(self.config["max_position_embeddings"]), LENGTHS[-1])
        self._known: dict[str, np.ndarray] = {}  # by text: several metrics ask for the same
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        reader = ShardReader(folder)
        keys = {key.removeprefix("bert."): key for key in sorted(reader.keys())}
        self.weights = {
            name: jnp.asarray(reader.read(keys[name], (slice(None),)), jnp.float32)
            for name in _names(self.config["num_hidden_layers"])
            if _present(name, keys, folder)
        }

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, width]; what is longer than the model takes is cut. A text is computed once."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known.update(zip(new, self._computed(new), strict=True))
        return np.stack([self._known[text] for text in texts])

    def _computed(self, texts: Sequence[str]) -> np.ndarray:
        made = self.tokenizer(list(texts), truncation=True, max_length=self.longest).input_ids
        order = sorted(range(len(made)), key=lambda i: len(made[i]))
        out = np.zeros((len(made), self.config["hidden_size"]), np.float32)
        for start in range(0, len(order), AT_ONCE):
            members = order[start : start + AT_ONCE]
            longest = next(n for n in LENGTHS if n >= len(made[members[-1]]))
            ids, mask = np.zeros((AT_ONCE, longest), np.int32), np.zeros((AT_ONCE, longest), bool)
            for row, i in enumerate(members):
                ids[row, : len(made[i])], mask[row, : len(made[i])] = made[i], True
            vectors = _encode(self.weights, ids, mask, self.sizes)
            out[members] = np.asarray(vectors)[: len(members)]
        return out


class _Sizes(NamedTuple):
    """What of a config.json the computation hangs on."""

    layers: int
    heads: int
    activation: str
    eps: float
    mean: bool  # else the first token's state


@partial(jax.jit, static_argnums=3)
def _encode(w: Mapping[str, Array], ids: Array, mask: Array, sizes: _Sizes) -> Array:
    """BERT (Devlin et al. 2019), post-norm: ids [B, T] and which of them count, to unit vectors [B, D]."""

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + sizes.eps)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    places, kinds = w["embeddings.position_embeddings.weight"], w["embeddings.token_type_embeddings.weight"]
    x = w["embeddings.word_embeddings.weight"][ids] + places[: ids.shape[1]] + kinds[0]
    x = norm(x, "embeddings.LayerNorm")
    for i in range(sizes.layers):
        at = f"encoder.layer.{i}"
        q, k, v = (
            dense(x, f"{at}.attention.self.{which}").reshape(*x.shape[:2], sizes.heads, -1)
            for which in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(x.shape)
        x = norm(x + dense(attended, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        hidden = ACTIVATIONS[sizes.activation](dense(x, f"{at}.intermediate.dense"))
        x = norm(x + dense(hidden, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    weight = mask[..., None].astype(x.dtype)
    pooled = (x * weight).sum(1) / weight.sum(1).clip(1) if sizes.mean else x[:, 0]
    return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True).clip(1e-12)


def _names(layers: int) -> list[str]:
    """The tensors that are used."""
    parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    parts += ["attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"]
    modules = [f"encoder.layer.{i}.{part}" for i in range(layers) for part in parts] + ["embeddings.LayerNorm"]
    tables = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    return tables + [f"{module}.{which}" for module in modules for which in ("weight", "bias")]


def _present(name: str, keys: Mapping[str, str], folder: Path) -> bool:
    if name not in keys:
        raise InputError(f"{folder}: the tensor {name} is missing from the checkpoint")
    return True


def _json(file: Path) -> dict[str, Any]:
    try:
        out = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: not a JSON file ({e})") from e
    if not isinstance(out, dict):
        raise InputError(f"{file}: expected a JSON object")
    return out
