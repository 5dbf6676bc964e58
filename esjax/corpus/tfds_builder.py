"""A TFDS dataset of dialogues from any source: ``esjax data build``, which needs no TensorFlow; tfds:NAME/SPLIT reads it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from esjax.corpus.sources import read
from esjax.errors import InputError
from esjax.settings.schema import Sources


class DialoguesConfig(tfds.core.BuilderConfig):
    """Where the splits come from, by name."""

    def __init__(self, name: str, sources: Mapping[str, Sources], format: str) -> None:
        super().__init__(name=name, description="Dialogues of seekers and supporters.")
        self.sources, self.format = dict(sources), format


class EsjaxDialogues(tfds.core.GeneratorBasedBuilder):
    """Dialogues in this project's schema (data/sample/README.md), as the readers give them."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Turns with role, text and strategy; labels; a system message."}  # noqa: RUF012

    def _info(self) -> Any:
        text = tfds.features.Text()
        labels = ("id", "system", "profile", "emotion", "problem", "situation")
        turn = {"role": text, "text": text, "strategy": text, "trained": tfds.features.Scalar(dtype=np.bool_)}
        features = {**dict.fromkeys(labels, text), "turns": tfds.features.Sequence(turn)}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = self.builder_config
        return {split: self._generate_examples(source, config.format) for split, source in config.sources.items()}

    def _generate_examples(self, source: Sources, format: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, d in enumerate(read(source, format).dialogues):
            labels = {name: getattr(d, name) for name in ("id", "system", "profile", "emotion", "problem", "situation")}
            turns = [
                {"role": t.role, "text": t.text, "strategy": t.strategy or "", "trained": t.trained} for t in d.turns
            ]
            yield number, {**labels, "turns": turns}


def build(name: str, sources: Mapping[str, Sources], format: str, folder: Path | None) -> Path:
    """Build the dataset esjax_dialogues/NAME in array_record files, under ``folder`` or $TFDS_DATA_DIR.

    Returns where it lies. Raises InputError where it is there already, or a source cannot be read.
    """
    for source in sources.values():
        read(source, format)  # broken rows are known before anything is written
    builder = EsjaxDialogues(data_dir=folder, config=DialoguesConfig(name, sources, format), file_format="array_record")
    if Path(builder.data_dir).exists():
        raise InputError(f"{builder.data_dir} exists; remove it, or give another --name")
    builder.download_and_prepare()
    return Path(builder.data_dir)
