"""Settings: YAML plus overrides, what is refused and how the message helps, round trips, and the files under configs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from esjax.cli import main
from esjax.corpus.readers import FORMATS
from esjax.errors import InputError
from esjax.evolve.models import BENCH
from esjax.settings import files
from esjax.settings.files import Overrides, changed, dump, keys, load, similar
from esjax.settings.identity import changes, differing
from esjax.settings.schema import Config

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
MINIMAL: dict[str, Any] = {
    "model": {"source": "/some/folder"},
    "data": {"train": "a.jsonl", "valid": "b.jsonl", "test": "c.jsonl", "replay": "r.jsonl", "window": 1024},
    "evolve": {"contexts_per_round": 5},
    "dpo": {"row_length": 1153},  # the least for a window of 1024 and replies of 128
}
TEMPERATURES = [f"{s}.temperature" for s in ("evolve.draft", "evolve.reflection", "evolve.refinement", "reply")]
# numpy's generators would refuse a seed below 0 later, with a traceback.
OUTSIDE = (
    "seed=-1 lora.rank=0 lora.rank=2.5 lora.rank=many lora.alpha=0 lora.alpha=-1 lora.alpha=.inf "
    "lora.targets=q_proj, model.dtype=float16 model.remat=some data.format=daily data.replay_share=1.0 "
    "data.replay_share=-0.1 data.window=15 data.train=null sft.learning_rate=0 sft.learning_rate=fast "
    "sft.learning_rate=.inf sft.warmup_fraction=1 sft.final_fraction=1.1 sft.weight_decay=-0.1 "
    "sft.weight_decay=.nan sft.clip_norm=0 sft.epochs=0 sft.batch_rows=0 sft.micro_rows=0 sft.checkpoint_every=0 "
    "sft.validate_every=0 dpo.beta=0 dpo.label_smoothing=0.5 dpo.nll_weight=-1 dpo.length_normalised=perhaps "
    "evolve.rounds=0 evolve.batch=0 evolve.contexts_per_round=0 evolve.draft.temperature=-0.1 "
    "evolve.draft.top_p=0 evolve.draft.top_p=1.01 evolve.draft.top_k=-1 evolve.draft.max_tokens=0 "
    "evolve.reflection.field_tokens=3 filters.min_words=0 filters.max_similarity=1.5 filters.max_repetition=-1 "
    "reply.max_contexts=0 "
).split()
AT_THEIR_BOUNDS = (
    "seed=0 lora.rank=1 data.replay_share=0 sft.warmup_fraction=0 sft.final_fraction=1 "
    "dpo.label_smoothing=0.49 evolve.draft.temperature=0 evolve.draft.top_p=1 evolve.reflection.field_tokens=4 "
    "filters.max_similarity=1 "
).split()


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


def refused(file: str, overrides: Any = ()) -> str:
    """The one line with which a config is refused."""
    with pytest.raises(InputError) as e:
        load(file, overrides)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 600
    return str(e.value)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_without_a_file_the_quickstart_is_read() -> None:
    assert load(None) == load(str(REPOSITORY / "configs" / "quickstart.yaml"))
    assert load(None) != load(None, ["--seed", "1"])


def test_the_file_is_read_and_the_rest_has_its_default(minimal: str) -> None:
    c, known = load(minimal), keys(Config)
    assert (c.model.source, c.data.window, c.data.train) == ("/some/folder", 1024, "a.jsonl")
    for key in known.keys() - leaves(MINIMAL).keys():
        assert setting(c, key) == known[key][1], key
    with pytest.raises(ValueError, match="frozen"):
        c.lora.rank = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--seed", "7"], 7),
        (["--seed=7"], 7),
        (["--seed", "7", "--seed", "8"], 8),  # the last one counts
        (["--seed", "010"], 10),  # in YAML 8
        (["--mesh.fsdp", "2"], 2),
        (["--sft.learning_rate", "3e-4"], 0.0003),
        (["--sft.learning-rate", "2.5e-4"], 0.00025),
        (["--sft.learning_rate=1"], 1.0),
        (["--dpo.length_normalised", "true"], True),
        (["--dpo.length_normalised", "on"], True),
        (["--data.replay", "null"], None),
        (["--evolve.contexts_per_round", "null"], None),
        (["--evolve.contexts_per_round", "12"], 12),
        (["--lora.targets", "[q_proj, v_proj]"], ("q_proj", "v_proj")),
        (["--lora.targets", "q_proj,v_proj"], ("q_proj", "v_proj")),  # as --help prints it
        (["--lora.targets", "q_proj"], ("q_proj",)),
        (["--model.source", "hf:org/name"], "hf:org/name"),
        (["--model.source=hf:a=b"], "hf:a=b"),
        (["--model.source=--odd"], "--odd"),
        (["--model.source", "2024-01-01"], "2024-01-01"),
        (["--model.source", "no"], "no"),
        (["--model.source", "a: b # c"], "a: b # c"),
        (["--model.source", "'007'"], "007"),
        (["--model.sha256", "1234567890"], "1234567890"),
        (["--model.sha256", "12.3e4"], "12.3e4"),
        (["--evolve.draft.top_p", "0.5"], 0.5),
    ],
)
def test_an_override_is_read_as_it_was_typed(minimal: str, words: list[str], value: Any) -> None:
    c, key = load(minimal, words), words[0][2:].partition("=")[0].replace("-", "_")
    assert setting(c, key) == value
    assert type(setting(c, key)) is type(value)
    assert setting(load(minimal), key) != value
    assert list(changes(load(minimal), c)) == [key]  # a section's other values stay
    assert load(minimal, {key: value}) == changed(load(minimal), {key: value}) == c  # as from Python


def test_what_was_asked_for_is_told_apart_from_what_holds(minimal: str) -> None:
    assert Overrides.of(None).settings() == {}  # the quickstart's config is nobody's wish
    given = Overrides.of(minimal, ["--seed=5", "--data.window", "600"])
    assert given.single == {"seed": "5", "data.window": "600"}
    assert given.settings() == leaves(MINIMAL) | given.single
    assert "dpo.row_length=100 is too small" in refused(minimal, {"dpo.row_length": 100})
    assert load(minimal, {"dpo.row_length": 100}, together=False).dpo.row_length == 100


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lora.rnak", "lora.rank"),
        ("sft.learing_rate", "sft.learning_rate"),
        ("evolve.draft.temprature", "evolve.draft.temperature"),
        ("modle.source", "model.source"),
        ("sedd", "seed"),
    ],
)
def test_a_misspelt_setting_names_the_nearest_and_the_file(
    minimal: str, tmp_path: Path, wrong: str, right: str
) -> None:
    assert refused(minimal, [f"--{wrong}", "1"]) == f"unknown setting --{wrong}: did you mean {right}?"
    assert refused(minimal, {wrong: 1}) == f"unknown setting {wrong}: did you mean {right}?"
    tree: dict[str, Any] = {k: dict(v) for k, v in MINIMAL.items()}
    node = tree
    *sections, last = wrong.split(".")
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = 1
    file = written(tmp_path, yaml.safe_dump(tree))
    assert refused(file).startswith(f"unknown setting {wrong}: did you mean {right}? (in {file}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--zzzzqqqq", "1"], "unknown setting --zzzzqqqq: `esjax evolve --help` lists all settings"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--sft.epochs", "3"], "--seed needs a value"),
        (["seed", "1"], "unexpected argument 'seed'"),
        (["--lora", "1"], "unknown setting --lora"),  # a section is no setting
        (["--seed", "true"], "setting seed='true'"),
        (["--seed", "1:30"], "setting seed='1:30'"),
        (["--model.source", ""], "--model.source is empty; give a value"),
        (["--data.replay="], "--data.replay is empty; give a value, or null for none"),
        (["--lora.targets", "q_proj,,v_proj"], "setting lora.targets.1"),
        (["--model.source", "null"], "setting model.source=None"),
        ({"lora": {"rank": 4}}, "unknown setting lora"),
    ],
)
def test_malformed_overrides(minimal: str, words: Any, message: str) -> None:
    assert message in refused(minimal, words)


@pytest.mark.parametrize("word", OUTSIDE)
def test_a_value_out_of_range_is_refused_by_name(minimal: str, word: str) -> None:
    assert f"setting {word.partition('=')[0]}" in refused(minimal, [f"--{word}"])


def test_a_value_at_its_bound_is_taken(minimal: str) -> None:
    c = load(minimal, [f"--{word}" for word in AT_THEIR_BOUNDS])
    assert {word: setting(c, word.partition("=")[0]) for word in AT_THEIR_BOUNDS} == {
        word: float(word.partition("=")[2]) for word in AT_THEIR_BOUNDS
    }


@pytest.mark.parametrize(
    ("good", "bad", "named"),
    [
        ("sft.batch_rows=6 sft.micro_rows=3", "sft.batch_rows=6 sft.micro_rows=4", "sft.micro_rows"),
        ("dpo.batch_rows=6 dpo.micro_rows=3", "dpo.batch_rows=6 dpo.micro_rows=4", "dpo.micro_rows"),
        ("sft.row_length=1024", "sft.row_length=1023", "sft.row_length=1023"),
        ("dpo.row_length=1153", "dpo.row_length=1152", "dpo.row_length=1152"),
        (
            "evolve.refinement.max_tokens=512 dpo.row_length=2000",
            "evolve.refinement.max_tokens=513 dpo.row_length=2000",
            "data.window=1024",
        ),
        (
            "evolve.draft.max_tokens=512 dpo.row_length=2000",
            "evolve.draft.max_tokens=513 dpo.row_length=2000",
            "data.window=1024",
        ),
        ("filters.min_length_ratio=2.4", "filters.min_length_ratio=2.5", "filters.min_length_ratio"),
        ("data.replay_share=0.5", "data.replay_share=0.5 data.replay=null", "data.replay_share=0.5"),
        ("model.source=pypi:d==1/m.gguf model.sha256=abc", "model.source=pypi:d==1/m.gguf", "model.sha256 is missing"),
    ],
)
def test_settings_that_do_not_fit_together(minimal: str, good: str, bad: str, named: str) -> None:
    load(minimal, [f"--{word}" for word in good.split()])
    assert named in refused(minimal, [f"--{word}" for word in bad.split()])


@pytest.mark.parametrize(("source", "hashed"), sorted(files.HASH_OF.items()))
def test_a_hash_stays_with_its_source(tmp_path: Path, source: str, hashed: str) -> None:
    """The hash in a config is that of the source in it: another source on the command line goes without."""
    file = written(tmp_path, dump(load(None, {source: "one", hashed: "1" * 64})))
    for given, expected in (
        ({}, "1" * 64),
        ({source: "one"}, "1" * 64),
        ({source: "other"}, None),
        ({source: "other", hashed: "2" * 64}, "2" * 64),
        ({hashed: "2" * 64}, "2" * 64),
    ):
        assert setting(load(file, given), hashed) == expected
        assert setting(changed(load(file), given), hashed) == expected
        assert Overrides.of(file, given).settings()[hashed] == expected
        assert setting(load(file, given), "seed") == 0


@pytest.mark.parametrize(("source", "hashed"), sorted(files.HASH_OF.items()))
def test_a_wheel_needs_its_hash(source: str, hashed: str) -> None:
    wheel = ("model:" if source == "eval.judge.source" else "") + "pypi:dist==1.0/dist/model.gguf"
    with pytest.raises(InputError, match=f"^{re.escape(hashed)} is missing: {re.escape(source)}={wheel} needs"):
        load(None, {source: wheel}, together=False)
    assert setting(load(None, {source: wheel, hashed: "1" * 64}), source) == wheel


@pytest.mark.parametrize("key", ["model.source", "data.train", "data.valid", "data.test"])
def test_what_has_no_default_must_be_given(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    tree = MINIMAL | {section: {k: v for k, v in MINIMAL[section].items() if k != name}}
    assert f"setting {key}: Field required" in refused(written(tmp_path, yaml.safe_dump(tree)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("seed: 1 # caf\xe9".encode("latin-1"))
    for file in (tmp_path / "absent.yaml", tmp_path, tmp_path / "latin.yaml"):
        assert f"{file}: cannot be read" in refused(str(file))


def test_bundled_files() -> None:
    name = "bundled:prompts/system.txt"
    assert files.bundled(name).read_text().strip() == files.read_text(name)
    assert files.bundled("/as/it/is") == Path("/as/it/is")
    with pytest.raises(InputError, match=r"bundled:prompts/absent\.txt: no such bundled file; looked in"):
        files.bundled("bundled:prompts/absent.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "seed is given twice"),
        ("lora: {rank: 1, rank: 2}\n", "rank is given twice"),
        ("lora:\n\trank: 1\n", "cannot start any token"),
        ("1: 2\n", "unknown setting 1"),
        ("lara: {}\n", "lara"),
        ("lora: {null: 2}\n", "unknown setting lora.None"),
        ("[1, 2]: 2\n", "not YAML"),
        ("seed: true\n", "setting seed=True: expected int"),
        ("sft: {learning_rate: yes}\n", "setting sft.learning_rate=True: expected float"),
        ("sft: [1, 2]\n", "setting sft=[1, 2]"),
        ("lora: \n", "lora"),
        ("lora: 3\n", "lora"),
        ("data: {train: 2024-13-45}\n", "not YAML"),
        ("model: {source: 2024-01-01}\n", "setting model.source="),
        ("model: {source: ''}\n", "setting model.source=''"),
        ("model: &a {source: x, model: *a}\n", "unknown setting model.model"),
        ("a: &a [*a]\n", "unknown setting a"),
        ("[" * 5000, "not YAML"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("just words", "expected a mapping"),
        ("", "expected a mapping"),
        ("seed: !!python/object:os.system x\n", "not YAML"),
        ("seed: 1\n---\nseed: 2\n", "not YAML"),
    ],
    ids=range(23),
)
def test_odd_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    rest = {k: v for k, v in MINIMAL.items() if f"{k}:" not in text}
    whole = yaml.safe_dump(rest) + text if ":" in text and text[0] != "[" else text
    file = written(tmp_path, whole)
    line = refused(file)
    assert message in line
    assert file in line
    if text.startswith("lora: ") and message == "lora":  # the same with an override
        assert "lora" in refused(file, ["--lora.rank", "4"])


def test_anchors_merges_and_small_numbers_in_a_file(tmp_path: Path) -> None:
    text = "sft: &a {learning_rate: 1e-4, epochs: 2}\ndpo: {<<: *a, epochs: 3, row_length: 1153}\n"
    rest = {k: v for k, v in MINIMAL.items() if k != "dpo"}
    c = load(written(tmp_path, yaml.safe_dump(rest) + text))
    assert (c.sft.learning_rate, c.dpo.learning_rate, c.sft.epochs, c.dpo.epochs) == (1e-4, 1e-4, 2, 3)


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("lr", ["sft.learning_rate", "dpo.learning_rate"]),
        ("learning-rate", ["sft.learning_rate", "dpo.learning_rate"]),
        ("temperature", TEMPERATURES),
        ("tempratur", TEMPERATURES),
        ("beta", ["dpo.beta"]),
        ("dpo.bta", ["dpo.beta"]),
        ("replies.top_p", ["reply.top_p"]),
        ("zzzzqqqq", []),
    ],
)
def test_what_a_word_may_mean(word: str, names: list[str]) -> None:
    assert similar(word, keys(Config)) == names


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


def test_the_command_alone_shows_its_help_and_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (
        ([], 2),
        (["--version"], 0),
        (["--help"], 0),
    ):  # 2: a launcher that lost its command is not done
        with pytest.raises(SystemExit) as stopped:
            main(words)
        out, err = capsys.readouterr()
        assert stopped.value.code == code
        assert ("esjax 0." if words == ["--version"] else "Run the whole method") in (err if code else out)


def test_the_form_that_help_prints_is_accepted(minimal: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each setting with its default, and each of its choices, as they stand in the help."""
    with pytest.raises(SystemExit):
        main(["evolve", "--help"])
    shown = re.findall(r"^  --(\S+) (\S+)  \((required|default (.*))\)$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, *_ in shown] == list(keys(Config))
    for name, form, _, default in shown:
        choices = form[1:-1].split(",") if form[0] == "{" else []
        for value in [*choices, *([default] if default else [])]:
            load(minimal, [f"--{name}", value], together=False)  # what must fit other settings is not in question here
    assert ("model.remat", "{auto,none,dots,offload,full}") in [(name, form) for name, form, *_ in shown]
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    shown = re.findall(r"^  --([a-z0-9_.]+\.\S+)", capsys.readouterr().out, re.MULTILINE)
    assert {"model.attention", "model.remat", "data.train"} <= set(shown) == set(BENCH) - {"seed"}


# --- writing and comparing -------------------------------------------------------------------------------------------


def test_dump_and_load_give_the_same_config(tmp_path: Path, minimal: str) -> None:
    odd = ["--seed=12345", "--sft.learning_rate=1e-5", "--dpo.beta=0.30000000000000004", "--lora.targets=[v_proj]"]
    odd += ["--model.source='/ä/b: c#d'", "--evolve.contexts_per_round=3", "--dpo.length_normalised=true"]
    for words in ([], odd, ["--model.source='007'"]):
        c = load(minimal, words)
        text = dump(c)
        again = load(written(tmp_path, text))
        assert again == c
        assert dump(again) == text
        assert leaves(yaml.safe_load(text)).keys() == keys(Config).keys()
    assert dump(load(minimal, odd)) != dump(load(minimal))


def test_differing_names_exactly_what_differs(minimal: str) -> None:
    a = load(minimal)
    b = load(minimal, ["--dpo.beta=0.2", "--seed=1", "--evolve.draft.top_k=5", "--lora.targets=[q_proj]"])
    assert differing(a, a) == []
    assert differing(a, b) == differing(b, a) == ["seed", "lora.targets", "evolve.draft.top_k", "dpo.beta"]
    assert differing(a, load(minimal, ["--evolve.refinement.top_k=5"])) == ["evolve.refinement.top_k"]


def test_how_to_compute_and_how_a_path_is_spelt_make_no_other_experiment(minimal: str) -> None:
    a = load(minimal)
    how = ["sft.micro_rows=1", "dpo.micro_rows=2", "evolve.batch=3", "reply.batch=5", "evolve.rounds=7", "mesh.fsdp=2"]
    how += ["model.remat=none", "model.attention=dense", "model.cache_dtype=bfloat16", "model.decoding_weights=shared"]
    how += ["sft.checkpoint_every=3", "dpo.checkpoints_kept=5", "sft.validate_every=9"]
    where = ["data.train=./b.jsonl", "prompts.refine=/r.txt", "screen.crisis_patterns=c.txt", "model.source=/m"]
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
    kinds = {"data.train": "str|list", "evolve.contexts_per_round": "int|null", "lora.targets": "list"}
    assert set(known["data.format"][0].split("|")) == FORMATS.keys() - {"preference"}
    assert {key: known[key][0] for key in kinds} == kinds
    assert known["evolve.draft.max_tokens"][:2] == ("int", 128)
    assert "evolve.draft" not in known


@pytest.mark.parametrize("file", CONFIGS, ids=[f.stem for f in CONFIGS])
def test_a_shipped_config_loads_and_sets_everything(file: Path, tmp_path: Path, minimal: str) -> None:
    c = load(str(file))
    assert sorted(leaves(yaml.safe_load(file.read_text()))) == sorted(keys(Config))
    assert load(written(tmp_path, dump(c))) == c
    assert file.read_text().startswith("#")  # the header says what the experiment is
    assert "data.format" not in leaves(yaml.safe_load(Path(minimal).read_text()))  # control: one left out is noticed
    assert "quickstart.yaml" in [f.name for f in CONFIGS]
