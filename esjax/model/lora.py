"""The adapter: PEFT's names and files, and merging into the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from esjax.errors import InputError
from esjax.model.families import LINEARS, Architecture, module_name
from esjax.model.layers import Lora
from esjax.runtime.mesh import read_sharded, to_host
from esjax.settings.schema import LoraSettings

Adapter = nnx.State  # the LoRAParams of a Decoder, nothing else


def lora_from(settings: LoraSettings) -> Lora:
    """The adapter's shape from settings. Raises InputError when a target names no linear layer."""
    for target in settings.targets:
        if target not in LINEARS:
            raise InputError(f"lora.targets: {target!r} matches no linear layer; allowed: {', '.join(LINEARS)}")
    if not settings.targets:
        raise InputError(f"lora.targets is empty; name some of {', '.join(LINEARS)}")
    return Lora(settings.targets, settings.rank, settings.alpha / settings.rank)


def peft_tensors(adapter: Adapter, arch: Architecture) -> dict[str, np.ndarray]:
    """PEFT's tensors: lora_A [R, in] and lora_B [out, R] of every layer, under PEFT's names. Every process must ask."""
    out = {}
    for (_, name, which), stacked in flatten(adapter).items():
        for layer, matrix in enumerate(to_host(stacked[...])):
            out[_peft_key(layer, name, which)] = np.ascontiguousarray(_turned(matrix, which), dtype=np.float32)
    if not out or len(out) != 2 * arch.layers * len({name for _, name, _ in flatten(adapter)}):
        raise AssertionError("the adapter is not complete")
    return out


def save_adapter(
    folder: Path, tensors: dict[str, np.ndarray], lora: Lora, base: str, revision: str | None = None
) -> None:
    """Write PEFT's tensors as a folder: adapter_config.json and adapter_model.safetensors. It must not exist.

    ``base`` and its ``revision`` are what PEFT opens the backbone by.
    """
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(lora.targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# Options of adapter_config.json that change what an adapter computes, and the value that is implemented.
SUPPORTED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "alora_invocation_tokens": None,
    "modules_to_save": None,
    "layers_to_transform": None,
}


def read_lora(folder: Path) -> Lora:
    """The shape of a PEFT adapter folder. Raises InputError for what esjax does not implement."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: cannot be read as JSON ({e}); expected a PEFT adapter folder") from e
    for key, allowed in SUPPORTED.items():
        if config.get(key, allowed) not in (allowed, None):
            raise InputError(f"{file}: {key}={config[key]!r} is not supported; allowed: {allowed!r}")
    # Named initialisations beyond PEFT's random ones (pissa, olora, loftq, ...) change the base as well.
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal"):
        raise InputError(f"{file}: init_lora_weights={config['init_lora_weights']!r} is not supported; allowed: true")
    targets = tuple(name for name in LINEARS if name in config["target_modules"])
    if set(config["target_modules"]) != set(targets):
        raise InputError(f"{file}: target_modules={config['target_modules']} are not all among {', '.join(LINEARS)}")
    return Lora(targets, config["r"], config["lora_alpha"] / config["r"])


def load_adapter(folder: Path, adapter: Adapter) -> Adapter:
    """Read a PEFT adapter folder into a copy of ``adapter``'s tree. Raises InputError naming a tensor that does not fit."""
    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{file}: cannot be read ({e}); the adapter is missing or damaged") from e
    flat: dict[tuple[str, ...], Any] = {}
    for path, like in flatten(adapter).items():
        layers, rows, columns = like.get_value().shape
        stacked = np.empty((layers, rows, columns), np.float32)
        for layer in range(layers):
            key = _peft_key(layer, path[1], path[2])
            if key not in tensors:
                raise InputError(f"{file}: the tensor {key} is missing")
            matrix = _turned(tensors.pop(key), path[2])
            if matrix.shape != (rows, columns):
                expected = _turned(np.empty((rows, columns)), path[2]).shape
                raise InputError(f"{file}: {key} has shape {_turned(matrix, path[2]).shape}, expected {expected}")
            stacked[layer] = matrix
        flat[path] = like.replace(read_sharded(stacked.shape, stacked.__getitem__, *like.get_metadata()["axes"]))
    if tensors:
        raise InputError(f"{file}: the tensor {min(tensors)} belongs to no adapted layer")
    return unflatten(flat)


def merge_kernel(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """W + scale A^T B for one layer, in float32, rounded to W's dtype: [in, out], [R, in], [R, out]."""
    merged = kernel.astype(np.float32) + scale * (a.astype(np.float32).T @ b.astype(np.float32))
    return merged.astype(kernel.dtype)


def flatten(state: nnx.State) -> dict[tuple[str, ...], Any]:
    """Path -> variable, sorted by path."""
    return dict(sorted(nnx.to_flat_state(state)))  # type: ignore[arg-type]


def unflatten(flat: dict[tuple[str, ...], Any]) -> nnx.State:
    """The inverse of flatten."""
    return nnx.from_flat_state(flat)  # type: ignore[arg-type]


def _turned(matrix: np.ndarray, which: str) -> np.ndarray:
    """Between our B [R, out] and PEFT's [out, R]; A is [R, in] in both."""
    return matrix.T if which == "lora_b" else matrix


def _peft_key(layer: int, name: str, which: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module_name(name)}.lora_{which[-1].upper()}.weight"
