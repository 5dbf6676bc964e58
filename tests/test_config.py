"""Settings: YAML plus overrides, what is refused and how the message helps, round trips, and the files under configs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from esjax.cli import main
from esjax.errors import InputError
from esjax.settings import files
from esjax.settings.files import Overrides, dump, keys, load, similar
from esjax.settings.identity import changes, differing
from esjax.settings.schema import Config

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
MINIMAL: dict[str, Any] = {
    "model": {"source": "/some/folder"},
    "data": {"train": "a.jsonl", "valid": "b.jsonl", "test": "c.jsonl", "replay": "r.jsonl", "window": 1024},
    "evolve": {"contexts_per_round": 5},
    "dpo": {"row_length": 1153},  # the least for a window of 1024 and replies of 128
}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted names -> values."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def setting(c: Config, key: str) -> Any:
    value: Any = c
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.fixture(scope="session")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file that gives little more than what has no default."""
    file = tmp_path_factory.mktemp("minimal") / "minimal.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return str(file)


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "given.yaml"
    file.write_text(text)
    return str(file)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_without_a_file_the_quickstart_is_read() -> None:
    assert load(None, []) == load(str(REPOSITORY / "configs" / "quickstart.yaml"), [])
    assert load(None, []) != load(None, ["--seed", "1"])


def test_the_file_is_read_and_the_rest_has_its_default(minimal: str) -> None:
    c = load(minimal, [])
    assert c.model.source == "/some/folder"
    assert c.data.window == 1024
    known = keys(Config)
    for key, (_, default, _) in known.items():
        if key not in leaves(MINIMAL):
            assert setting(c, key) == default, key
    assert setting(c, "data.train") != known["data.train"][1]


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--seed", "7"], "seed", 7),
        (["--seed=7"], "seed", 7),
        (["--sft.learning_rate", "3e-4"], "sft.learning_rate", 0.0003),
        (["--sft.learning-rate", "2.5e-4"], "sft.learning_rate", 0.00025),
        (["--sft.learning_rate=1"], "sft.learning_rate", 1.0),
        (["--dpo.length_normalised", "true"], "dpo.length_normalised", True),
        (["--data.replay", "null"], "data.replay", None),
        (["--evolve.contexts_per_round", "null"], "evolve.contexts_per_round", None),
        (["--evolve.contexts_per_round", "12"], "evolve.contexts_per_round", 12),
        (["--lora.targets", "[q_proj, v_proj]"], "lora.targets", ("q_proj", "v_proj")),
        (["--model.source", "hf:org/name"], "model.source", "hf:org/name"),
        (["--model.source=hf:a=b"], "model.source", "hf:a=b"),
        (["--evolve.draft.top_p", "0.5"], "evolve.draft.top_p", 0.5),
        (["--seed", "7", "--seed", "8"], "seed", 8),  # the last one counts
    ],
)
def test_overrides(minimal: str, words: list[str], key: str, value: Any) -> None:
    c = load(minimal, words)
    assert setting(c, key) == value
    assert type(setting(c, key)) is type(value)
    assert setting(load(minimal, []), key) != value
    # Where a file lies does not count, what is in it does.
    assert differing(load(minimal, []), c) == ([] if key == "model.source" else [key])


def test_overrides_win_over_the_file_and_make_missing_sections(minimal: str) -> None:
    c = load(minimal, ["--data.window", "512", "--reply.max_tokens", "9"])
    assert (c.data.window, c.reply.max_tokens) == (512, 9)
    assert c.data.train == "a.jsonl"  # the section's other values stay


def test_settings_are_frozen(minimal: str) -> None:
    c = load(minimal, [])
    with pytest.raises(ValueError, match="frozen"):
        c.lora.rank = 3  # type: ignore[misc]
    assert c.lora.rank == 16


# --- what is refused -------------------------------------------------------------------------------------------------

MISSPELT = [
    ("lora.rnak", "lora.rank"),
    ("sft.learing_rate", "sft.learning_rate"),
    ("evolve.draft.temprature", "evolve.draft.temperature"),
    ("modle.source", "model.source"),
    ("sedd", "seed"),
]


@pytest.mark.parametrize(("wrong", "right"), MISSPELT)
def test_a_misspelt_setting_on_the_command_line_names_the_nearest(minimal: str, wrong: str, right: str) -> None:
    with pytest.raises(InputError) as e:
        load(minimal, [f"--{wrong}", "1"])
    assert str(e.value) == f"unknown setting --{wrong}: did you mean {right}?"


@pytest.mark.parametrize(("wrong", "right"), MISSPELT)
def test_a_misspelt_setting_in_a_file_names_the_nearest_and_the_file(tmp_path: Path, wrong: str, right: str) -> None:
    tree: dict[str, Any] = {k: dict(v) for k, v in MINIMAL.items()}
    node = tree
    *sections, last = wrong.split(".")
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = 1
    file = written(tmp_path, yaml.safe_dump(tree))
    with pytest.raises(InputError) as e:
        load(file, [])
    assert str(e.value).startswith(f"unknown setting {wrong}: did you mean {right}?")
    assert file in str(e.value)


def test_a_name_unlike_any_setting_points_to_the_help(minimal: str) -> None:
    with pytest.raises(InputError, match=r"unknown setting --zzzzqqqq: `esjax evolve --help` lists all settings"):
        load(minimal, ["--zzzzqqqq", "1"])


def test_an_unknown_empty_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lara"):
        load(written(tmp_path, yaml.safe_dump(MINIMAL | {"lara": {}})), [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed"], "--seed needs a value"),
        (["seed", "1"], "unexpected argument 'seed'"),
        (["--lora", "1"], "unknown setting --lora"),  # a section is no setting
    ],
)
def test_malformed_overrides(minimal: str, words: list[str], message: str) -> None:
    with pytest.raises(InputError) as e:
        load(minimal, words)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "-1"),  # numpy's generators refuse it later, with a traceback
        ("lora.rank", "0"),
        ("lora.rank", "2.5"),
        ("lora.rank", "many"),
        ("lora.alpha", "0"),
        ("lora.alpha", "-1"),
        ("lora.alpha", ".inf"),
        ("lora.targets", "q_proj,"),
        ("model.dtype", "float16"),
        ("model.remat", "some"),
        ("data.format", "daily"),
        ("data.replay_share", "1.0"),
        ("data.replay_share", "-0.1"),
        ("data.window", "15"),
        ("data.train", "null"),
        ("sft.learning_rate", "0"),
        ("sft.learning_rate", "fast"),
        ("sft.learning_rate", ".inf"),
        ("sft.warmup_fraction", "1"),
        ("sft.final_fraction", "1.1"),
        ("sft.weight_decay", "-0.1"),
        ("sft.weight_decay", ".nan"),
        ("sft.clip_norm", "0"),
        ("sft.epochs", "0"),
        ("sft.batch_rows", "0"),
        ("sft.micro_rows", "0"),
        ("sft.checkpoint_every", "0"),
        ("sft.validate_every", "0"),
        ("dpo.beta", "0"),
        ("dpo.label_smoothing", "0.5"),
        ("dpo.nll_weight", "-1"),
        ("dpo.length_normalised", "perhaps"),
        ("evolve.rounds", "0"),
        ("evolve.batch", "0"),
        ("evolve.contexts_per_round", "0"),
        ("evolve.draft.temperature", "-0.1"),
        ("evolve.draft.top_p", "0"),
        ("evolve.draft.top_p", "1.01"),
        ("evolve.draft.top_k", "-1"),
        ("evolve.draft.max_tokens", "0"),
        ("evolve.reflection.field_tokens", "3"),
        ("filters.min_words", "0"),
        ("filters.max_similarity", "1.5"),
        ("filters.max_repetition", "-1"),
        ("reply.max_contexts", "0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(minimal: str, key: str, value: str) -> None:
    with pytest.raises(InputError) as e:
        load(minimal, [f"--{key}", value])
    assert f"setting {key}" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "0"),
        ("lora.rank", "1"),
        ("data.replay_share", "0"),
        ("sft.warmup_fraction", "0"),
        ("sft.final_fraction", "1"),
        ("dpo.label_smoothing", "0.49"),
        ("evolve.draft.temperature", "0"),
        ("evolve.draft.top_p", "1"),
        ("evolve.reflection.field_tokens", "4"),
        ("filters.max_similarity", "1"),
    ],
)
def test_a_value_at_its_bound_is_taken(minimal: str, key: str, value: str) -> None:
    assert setting(load(minimal, [f"--{key}", value]), key) == float(value)


@pytest.mark.parametrize(
    ("good", "bad", "named"),
    [
        (["--sft.batch_rows=6", "--sft.micro_rows=3"], ["--sft.batch_rows=6", "--sft.micro_rows=4"], "sft.micro_rows"),
        (["--dpo.batch_rows=6", "--dpo.micro_rows=3"], ["--dpo.batch_rows=6", "--dpo.micro_rows=4"], "dpo.micro_rows"),
        (["--sft.row_length=1024"], ["--sft.row_length=1023"], "sft.row_length=1023"),
        (["--dpo.row_length=1153"], ["--dpo.row_length=1152"], "dpo.row_length=1152"),
        (
            ["--evolve.refinement.max_tokens=512", "--dpo.row_length=2000"],
            ["--evolve.refinement.max_tokens=513", "--dpo.row_length=2000"],
            "data.window=1024",
        ),
        (
            ["--evolve.draft.max_tokens=512", "--dpo.row_length=2000"],
            ["--evolve.draft.max_tokens=513", "--dpo.row_length=2000"],
            "data.window=1024",
        ),
        (
            ["--filters.min_length_ratio=2.4"],
            ["--filters.min_length_ratio=2.5"],  # the default of the other
            "filters.min_length_ratio",
        ),
        (["--data.replay_share=0.5"], ["--data.replay_share=0.5", "--data.replay=null"], "data.replay_share=0.5"),
        (
            ["--model.source=pypi:d==1/m.gguf", "--model.sha256=abc"],
            ["--model.source=pypi:d==1/m.gguf"],
            "model.sha256 is missing",
        ),
    ],
)
def test_settings_that_do_not_fit_together(minimal: str, good: list[str], bad: list[str], named: str) -> None:
    load(minimal, good)
    with pytest.raises(InputError) as e:
        load(minimal, bad)
    assert named in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("key", ["model.source", "data.train", "data.valid", "data.test"])
def test_what_has_no_default_must_be_given(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    tree = MINIMAL | {section: {k: v for k, v in MINIMAL[section].items() if k != name}}
    with pytest.raises(InputError, match=f"setting {key}: Field required"):
        load(written(tmp_path, yaml.safe_dump(tree)), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("just words", "expected a mapping"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(InputError) as e:
        load(file, [])
    assert message in str(e.value)
    assert file in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", ["", "3", "[1]"], ids=["nothing", "a number", "a list"])
def test_a_section_that_is_no_mapping_is_bad_input_with_and_without_an_override(tmp_path: Path, content: str) -> None:
    file = written(tmp_path, yaml.safe_dump(MINIMAL) + f"lora: {content}\n")
    with pytest.raises(InputError, match="lora"):
        load(file, [])
    with pytest.raises(InputError, match="lora"):
        load(file, ["--lora.rank", "4"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for file in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load(str(file), [])
    (tmp_path / "latin.yaml").write_bytes("seed: 1 # caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.yaml: cannot be read"):
        load(str(tmp_path / "latin.yaml"), [])


def test_bundled_files() -> None:
    assert files.bundled("bundled:prompts/system.txt").read_text().strip() == files.read_text(
        "bundled:prompts/system.txt"
    )
    assert files.bundled("/as/it/is") == Path("/as/it/is")
    with pytest.raises(InputError, match=r"bundled:prompts/absent\.txt: no such bundled file; looked in"):
        files.bundled("bundled:prompts/absent.txt")


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--lora.targets", "q_proj,v_proj"], "lora.targets", ("q_proj", "v_proj")),  # as --help prints it
        (["--lora.targets", "q_proj"], "lora.targets", ("q_proj",)),
        (["--model.sha256", "1234567890"], "model.sha256", "1234567890"),
        (["--model.sha256", "12.3e4"], "model.sha256", "12.3e4"),
        (["--model.source", "2024-01-01"], "model.source", "2024-01-01"),
        (["--model.source", "no"], "model.source", "no"),
        (["--model.source", "a: b # c"], "model.source", "a: b # c"),
        (["--model.source", "'007'"], "model.source", "007"),
        (["--model.source=--odd"], "model.source", "--odd"),
        (["--seed", "010"], "seed", 10),  # in YAML 8
        (["--mesh.fsdp", "-1"], "mesh.fsdp", -1),
        (["--mesh.fsdp=2"], "mesh.fsdp", 2),
        (["--sft.learning_rate", "1e-3"], "sft.learning_rate", 0.001),
        (["--dpo.length_normalised", "on"], "dpo.length_normalised", True),
        (["--model.sha256", "null"], "model.sha256", None),
    ],
)
def test_a_value_is_read_as_it_was_typed(minimal: str, words: list[str], key: str, value: Any) -> None:
    assert setting(load(minimal, words), key) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "true"], "setting seed='true'"),
        (["--seed", "1:30"], "setting seed='1:30'"),
        (["--model.source", ""], "--model.source is empty; give a value"),
        (["--data.replay="], "--data.replay is empty; give a value, or null for none"),
        (["--seed", "--sft.epochs", "3"], "--seed needs a value"),
        (["--lora.targets", "q_proj,,v_proj"], "setting lora.targets.1"),
        (["--model.source", "null"], "setting model.source=None"),
    ],
)
def test_a_value_that_is_none_is_refused(minimal: str, words: list[str], message: str) -> None:
    with pytest.raises(InputError) as e:
        load(minimal, words)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "seed is given twice"),
        ("lora: {rank: 1, rank: 2}\n", "rank is given twice"),
        ("lora:\n\trank: 1\n", "cannot start any token"),
        ("1: 2\n", "unknown setting 1"),
        ("lora: {null: 2}\n", "unknown setting lora.None"),
        ("[1, 2]: 2\n", "not YAML"),
        ("seed: true\n", "setting seed=True: expected int"),
        ("sft: {learning_rate: yes}\n", "setting sft.learning_rate=True: expected float"),
        ("sft: [1, 2]\n", "setting sft=[1, 2]"),
        ("data: {train: 2024-13-45}\n", "not YAML"),
        ("model: {source: 2024-01-01}\n", "setting model.source="),
        ("model: {source: ''}\n", "setting model.source=''"),
        ("model: &a {source: x, model: *a}\n", "unknown setting model.model"),
        ("a: &a [*a]\n", "unknown setting a"),
        ("[" * 5000, "not YAML"),
        ("seed: !!python/object:os.system x\n", "not YAML"),
        ("seed: 1\n---\nseed: 2\n", "not YAML"),
    ],
    ids=range(17),
)
def test_odd_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    rest = {k: v for k, v in MINIMAL.items() if f"{k}:" not in text}
    with pytest.raises(InputError) as e:
        load(written(tmp_path, yaml.safe_dump(rest) + text if text[0] != "[" else text), [])
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 600


def test_anchors_merges_and_small_numbers_in_a_file(tmp_path: Path) -> None:
    text = "sft: &a {learning_rate: 1e-4, epochs: 2}\ndpo: {<<: *a, epochs: 3, row_length: 1153}\n"
    rest = {k: v for k, v in MINIMAL.items() if k != "dpo"}
    c = load(written(tmp_path, yaml.safe_dump(rest) + text), [])
    assert (c.sft.learning_rate, c.dpo.learning_rate, c.sft.epochs, c.dpo.epochs) == (1e-4, 1e-4, 2, 3)


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("lr", ["sft.learning_rate", "dpo.learning_rate"]),
        (
            "temperature",
            [f"{s}.temperature" for s in ("evolve.draft", "evolve.reflection", "evolve.refinement", "reply")],
        ),
        ("learning-rate", ["sft.learning_rate", "dpo.learning_rate"]),
        (
            "tempratur",
            [f"{s}.temperature" for s in ("evolve.draft", "evolve.reflection", "evolve.refinement", "reply")],
        ),
        ("beta", ["dpo.beta"]),
        ("dpo.bta", ["dpo.beta"]),
        ("answer.top_p", ["reply.top_p"]),
        ("zzzzqqqq", []),
    ],
)
def test_what_a_word_may_mean(word: str, names: list[str]) -> None:
    assert similar(word, keys(Config)) == names


def test_what_was_asked_for_is_told_apart_from_what_holds(minimal: str) -> None:
    assert Overrides.of(None).settings() == {}  # the quickstart's config is nobody's wish
    given = Overrides.of(minimal, ["--seed=5", "--data.window", "600"])
    assert given.single == {"seed": "5", "data.window": "600"}
    assert given.settings() == leaves(MINIMAL) | given.single
    with pytest.raises(InputError, match=r"dpo\.row_length=100 is too small"):
        load(minimal, {"dpo.row_length": 100})
    assert load(minimal, {"dpo.row_length": 100}, together=False).dpo.row_length == 100


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["sample", "--temperature", "0.5"], "unknown option --temperature: did you mean --reply.temperature?"),
        (["sft", "--lr", "3"], "unknown option --lr: did you mean --sft.learning_rate or --dpo.learning_rate?"),
        (["sample", "--lr", "3"], "unknown option --lr: see esjax sample --help"),
        (["sample", "--promts", "x"], "unknown option --promts: did you mean --prompts?"),
        (["sample", "--hlep"], "unknown option --hlep: see esjax sample --help"),
    ],
)
def test_a_wrong_option_gets_a_useful_hint(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {"sample": ["--model", "m", "--prompts", "p", "--out", "o"], "sft": ["--run-dir", "r"]}[words[0]]
    with pytest.raises(SystemExit) as stopped:
        main([*words[:1], *needed, *words[1:]])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"esjax: error: {hint}\n"


def test_the_form_that_help_prints_is_accepted(minimal: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each setting with its default, and each of its choices, as they stand in the help."""
    with pytest.raises(SystemExit):
        main(["evolve", "--help"])
    shown = re.findall(r"^  --(\S+) (\S+)  \((required|default (.*))\)$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, *_ in shown] == list(keys(Config))
    for name, form, _, default in shown:
        choices = form[1:-1].split(",") if form[0] == "{" else []
        for value in [*choices, *([default] if default else [])]:
            # What must fit other settings is not in question here.
            assert setting(load(minimal, [f"--{name}", value], together=False), name) is not Ellipsis
    assert ("model.remat", "{none,dots,offload,full}") in [(name, form) for name, form, *_ in shown]
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert re.findall(r"^  --([a-z0-9_.]+\.\S+)", capsys.readouterr().out, re.MULTILINE) == [
        "model.attention",
        "model.remat",
    ]


# --- writing and comparing -------------------------------------------------------------------------------------------


def test_dump_and_load_give_the_same_config(tmp_path: Path, minimal: str) -> None:
    odd = [
        "--seed=12345",
        "--sft.learning_rate=1e-5",
        "--dpo.beta=0.30000000000000004",
        "--lora.targets=[v_proj]",
        "--model.source='/ä/b: c#d'",
        "--evolve.contexts_per_round=3",
        "--dpo.length_normalised=true",
    ]
    for words in ([], odd):
        c = load(minimal, words)
        text = dump(c)
        again = load(written(tmp_path, text), [])
        assert again == c
        assert dump(again) == text
        assert leaves(yaml.safe_load(text)).keys() == keys(Config).keys()
    assert load(minimal, odd) != load(minimal, [])
    assert dump(load(minimal, odd)) != dump(load(minimal, []))


def test_a_source_that_looks_like_a_number_survives_the_round_trip(tmp_path: Path) -> None:
    c = load(written(tmp_path, yaml.safe_dump(MINIMAL | {"model": {"source": "007"}})), [])
    assert load(written(tmp_path, dump(c)), []).model.source == c.model.source == "007"


def test_differing_names_exactly_what_differs(minimal: str) -> None:
    a = load(minimal, [])
    b = load(minimal, ["--dpo.beta=0.2", "--seed=1", "--evolve.draft.top_k=5", "--lora.targets=[q_proj]"])
    assert differing(a, a) == []
    assert differing(a, b) == differing(b, a) == ["seed", "lora.targets", "evolve.draft.top_k", "dpo.beta"]
    assert differing(a, load(minimal, ["--evolve.refinement.top_k=5"])) == ["evolve.refinement.top_k"]


def test_how_to_compute_and_how_a_path_is_spelt_make_no_other_experiment(minimal: str) -> None:
    a = load(minimal, [])
    how = ["sft.micro_rows=1", "dpo.micro_rows=2", "evolve.batch=3", "reply.batch=5", "evolve.rounds=7", "mesh.fsdp=2"]
    how += ["model.remat=none", "model.attention=dense", "model.cache_dtype=bfloat16", "model.decoding_weights=shared"]
    how += ["sft.checkpoint_every=3", "dpo.checkpoints_kept=5", "sft.validate_every=9"]
    where = ["data.train=./b.jsonl", "prompts.refine=/r.txt", "filters.crisis_patterns=c.txt", "model.source=/m"]
    b = load(minimal, [f"--{word}" for word in [*how, *where]])
    assert differing(a, b) == []
    assert sorted(changes(a, b)) == sorted(word.split("=")[0] for word in [*how, *where])
    # Controls: what defines the result, and a file where there was none.
    other = load(minimal, ["--model.dtype=bfloat16", "--sft.batch_rows=16", "--data.replay=null"])
    assert differing(a, other) == ["model.dtype", "data.replay", "sft.batch_rows"]


# --- documentation ---------------------------------------------------------------------------------------------------


def test_every_setting_has_a_type_and_a_description() -> None:
    known = keys(Config)
    assert [k for k, (_, _, text) in known.items() if not text.strip()] == []
    assert known["data.format"][0] == "sample|esconv"
    assert known["evolve.contexts_per_round"][0] == "int|null"
    assert known["lora.targets"][0] == "list"
    assert known["evolve.draft.max_tokens"][:2] == ("int", 128)
    assert "evolve.draft" not in known


def test_there_are_configs() -> None:
    assert "quickstart.yaml" in [f.name for f in CONFIGS]


@pytest.mark.parametrize("file", CONFIGS, ids=[f.stem for f in CONFIGS])
def test_a_shipped_config_loads_and_sets_everything(file: Path, tmp_path: Path) -> None:
    c = load(str(file), [])
    given = leaves(yaml.safe_load(file.read_text()))
    assert sorted(given) == sorted(keys(Config))
    assert load(written(tmp_path, dump(c)), []) == c
    assert file.read_text().startswith("#")  # the header says what the experiment is


def test_a_config_that_leaves_a_setting_out_is_noticed(minimal: str) -> None:
    given = leaves(yaml.safe_load(Path(minimal).read_text()))
    assert sorted(set(keys(Config)) - set(given))[:2] == ["data.format", "data.replay_share"]
