"""The adapter: PEFT's names and files, and merging into the base."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from esjax.errors import InputError
from esjax.model.families import FUSED, LINEARS, Architecture, module_name
from esjax.model.linear import Lora
from esjax.runtime.mesh import read_sharded, to_host
from esjax.settings.schema import LoraSettings

Adapter = nnx.State  # the LoRAParams of a Decoder, nothing else


def lora_from(settings: LoraSettings, arch: Architecture | None = None) -> Lora:
    """The adapter's shape from settings. Raises InputError when a target names no linear layer of the architecture."""
    linears = LINEARS if arch is None else arch.linears
    allowed = (
        f"all-linear, {', '.join(linears)}, or a regular expression of names such as model.layers.0.self_attn.o_proj"
    )
    chosen: set[str] = set()
    for target in settings.targets:
        found = set(linears) if target == "all-linear" else {target} & set(linears)
        found = found or _matching(target, linears, 1 if arch is None else arch.layers)
        if not found:
            raise InputError(f"lora.targets: {target!r} matches no linear layer; allowed: {allowed}")
        chosen |= found
    if not chosen:
        raise InputError(f"lora.targets is empty; name some of {allowed}")
    scale = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
    return Lora(
        tuple(name for name in linears if name in chosen), settings.rank, scale, settings.init, settings.dropout
    )


def _matching(pattern: str, linears: Sequence[str], layers: int) -> set[str]:
    """Linear layers whose whole name a regular expression matches, as in PEFT. Raises InputError where only some layers'."""
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise InputError(f"lora.targets: {pattern!r} is not a regular expression ({e})") from e
    found = set()
    for name in linears:
        hits = [bool(compiled.fullmatch(f"model.layers.{i}.{module_name(name)}")) for i in range(layers)]
        if any(hits) and not all(hits):
            raise InputError(
                f"lora.targets: {pattern!r} matches {name} in {sum(hits)} of {layers} layers; an adapter of ours has all or none"
            )
        found |= {name} if all(hits) else set()
    return found


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
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": lora.dropout,
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
    "fan_in_fan_out": False,
    "alora_invocation_tokens": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "lora_bias": False,
}
KEY = re.compile(r"base_model\.model\.(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])\.weight")


class Stored(NamedTuple):
    """A PEFT adapter folder: its tensors, and what their layers are scaled by."""

    folder: Path
    lora: Lora  # the largest rank of all, and the scale of most
    tensors: dict[str, np.ndarray]
    scale_of: dict[str, float]  # by module name
    config: dict[str, Any]


def read_peft(folder: Path) -> Stored:
    """Read a PEFT adapter folder, with patterns of ranks and alphas, on some layers or all, rank-stabilised or not.

    Raises InputError for a file that is missing or damaged, and for what esjax does not implement.
    """
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{file}: cannot be read as JSON ({e}); expected a PEFT adapter folder") from e
    for key, allowed in SUPPORTED.items():
        if config.get(key, allowed) not in (allowed, None):
            raise InputError(f"{file}: {key}={config[key]!r} is not supported; allowed: {allowed!r}")
    # Named initialisations beyond PEFT's random ones (pissa, olora, loftq, ...) change the base as well.
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal"):
        raise InputError(f"{file}: init_lora_weights={config['init_lora_weights']!r} is not supported; allowed: true")
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{weights}: cannot be read ({e}); the adapter is missing or damaged") from e
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    scale_of: dict[str, float] = {}
    names: set[str] = set()
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{weights}: the tensor {key} belongs to no linear layer of a decoder layer")
        module, _, linear, which = match.groups()
        own = _by_pattern(ranks, module, rank)
        if tensor.ndim != 2 or tensor.shape[which == "B"] != own:
            raise InputError(f"{weights}: {key} has shape {list(tensor.shape)}, which is not of rank {own}")
        scale = _by_pattern(alphas, module, alpha)
        scale_of[module] = scale / (math.sqrt(own) if config.get("use_rslora") else own)
        names.add(linear)
    if not names:
        raise InputError(f"{weights}: no adapter in it")
    most = max(max(t.shape[KEY.fullmatch(k)[4] == "B"] for k, t in tensors.items()), 1)  # type: ignore[index]
    counted = Counter(scale_of.values())
    if unknown := names - {*LINEARS, *FUSED}:
        raise InputError(f"{weights}: {min(unknown)} is no linear layer of a decoder layer of ours")
    targets = tuple(sorted(names, key=(*LINEARS, *FUSED).index))
    return Stored(folder, Lora(targets, most, counted.most_common(1)[0][0]), tensors, scale_of, config)


def _by_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, ends the module's name."""
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), default)


def read_lora(folder: Path) -> Lora:
    """The shape of a PEFT adapter folder. Raises InputError for what esjax does not implement."""
    return read_peft(folder).lora


def load_adapter(folder: Path, adapter: Adapter) -> Adapter:
    """Read a PEFT adapter folder into a copy of ``adapter``'s tree; see ``place_adapter``."""
    return place_adapter(read_peft(folder), adapter)


def place_adapter(stored: Stored, adapter: Adapter) -> Adapter:
    """The tensors of a PEFT folder in a copy of ``adapter``'s tree. Raises InputError naming one that is missing or unfit.

    Layers that the adapter leaves out on purpose get zeros, as do ranks beyond a layer's own: both stay zero in training.
    Where layers differ in scale, it goes into B.
    """
    file = stored.folder / "adapter_model.safetensors"
    c = stored.config
    in_all = set() if c.get("layers_to_transform") or c.get("exclude_modules") else c.get("target_modules")
    flat: dict[tuple[str, ...], Any] = {}
    used: set[str] = set()
    for path, like in flatten(adapter).items():
        layers, rank, size = like.get_value().shape
        stacked = np.zeros((layers, rank, size), np.float32)
        for layer in range(layers):
            module = f"model.layers.{layer}.{module_name(path[1])}"
            key, other = (f"base_model.model.{module}.lora_{w}.weight" for w in ("AB" if path[2] == "lora_a" else "BA"))
            if key not in stored.tensors:
                if other in stored.tensors or (isinstance(in_all, list) and path[1] in in_all):
                    raise InputError(f"{file}: the tensor {key} is missing")
                continue
            used.add(key)
            matrix = _turned(stored.tensors[key], path[2]).astype(np.float32)
            if matrix.shape[1] != size or len(matrix) > rank:
                raise InputError(
                    f"{file}: {key} has shape {list(stored.tensors[key].shape)}, which does not fit a layer of {size} and rank "
                    f"{rank}"
                )
            if path[2] == "lora_b" and stored.scale_of[module] != stored.lora.scale:
                matrix = matrix * np.float32(stored.scale_of[module] / stored.lora.scale)
            stacked[layer, : len(matrix)] = matrix
        flat[path] = like.replace(read_sharded(stacked.shape, stacked.__getitem__, *like.get_metadata()["axes"]))
    if extra := stored.tensors.keys() - used:
        raise InputError(f"{file}: the tensor {min(extra)} belongs to no adapted layer")
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
