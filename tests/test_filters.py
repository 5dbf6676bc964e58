"""Filters and prompts: every reason fires on its own example and on no good reply; files that researchers edit work."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import chat, read_dialogues
from hypothesis import given, settings
from hypothesis import strategies as st

from esjax.corpus.dialogue import Message
from esjax.errors import InputError
from esjax.evolve.choose import build_pairs, candidates
from esjax.evolve.filters import REPLY_REASONS, Filters, repetition
from esjax.evolve.pairs import Context
from esjax.evolve.reflect import FIELDS, Instructions
from esjax.rows import common_prefix
from esjax.settings.files import load
from esjax.settings.schema import Config, FilterSettings, ScreenSettings
from esjax.tokens.encode import Prompt
from esjax.tokens.tokenizer import ChatTokenizer

SEEKER = "My sister forgot my birthday again and I baked her a lemon cake only last month."
CONTEXT: list[Message] = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": SEEKER},
]
GOOD = "A lemon cake, and then silence. That stings more than you let on, I think."
OTHER = "You remember her days and she forgets yours; what would you like to hear from her now?"


# --- replies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "context", "reply", "finish"),
    [
        *(
            (None, CONTEXT, reply, "stop")
            for reply in (GOOD, OTHER, "She forgot. You did not.", "Oh.\n\nTell me more, dear.")
        ),
        ("crisis", chat("Some days I want to die."), GOOD, "stop"),
        ("crisis", [*chat("I think of suicide"), *CONTEXT], GOOD, "stop"),
        ("crisis", CONTEXT, "It sounds like you want to kill yourself, and I hear that.", "stop"),
        ("truncated", CONTEXT, GOOD, "length"),
        ("few_words", CONTEXT, "", "stop"),
        ("few_words", CONTEXT, "Oh dear, oh", "stop"),
        ("few_words", CONTEXT, "... !? -- ... ?!", "stop"),
        ("scaffolding", CONTEXT, "Profile: warm and dry. " + GOOD, "stop"),
        ("scaffolding", CONTEXT, "Here is my refined reply. " + GOOD, "stop"),
        ("scaffolding", CONTEXT, "As an AI I cannot bake, but " + GOOD, "stop"),
        ("scaffolding", CONTEXT, GOOD + "\n[the answer ends]", "stop"),
        ("scaffolding", CONTEXT, "<|im_start|> " + GOOD, "stop"),
        ("speaks_for_seeker", CONTEXT, GOOD + "\nSeeker: thank you so much", "stop"),
        ("speaks_for_seeker", CONTEXT, "User: I feel better. " + GOOD, "stop"),
        ("speaks_for_seeker", CONTEXT, "I baked her a lemon cake, only last month! And she?", "stop"),
        ("repetition", CONTEXT, "it is hard for you and it is hard for you and it is hard for you", "stop"),
    ],
)
def test_each_reason_fires(
    filters: Filters, reason: str | None, context: list[Message], reply: str, finish: str
) -> None:
    assert filters.reply_fault(context, reply, finish) == reason


def test_no_context_or_reply_of_the_sample_corpus_is_dropped_wrongly(filters: Filters) -> None:
    """Replies that people would keep: the corpus' own. Its card says that no crisis occurs in it on purpose."""
    counts: Counter[str | None] = Counter()
    for name in ("train", "valid", "test"):
        dialogues = read_dialogues("sample", f"bundled:data/sample/{name}.jsonl")
        assert filters.screen.screened(dialogues).kept == dialogues
        for d in dialogues:
            for turn in d.supporter_turns():
                counts[filters.reply_fault(d.messages(turn), d.turns[turn].text, "stop")] += 1
    assert counts["crisis"] == counts["scaffolding"] == counts["repetition"] == 0
    assert counts[None] > 0.97 * counts.total()


def test_what_the_supporter_said_before_is_no_crisis_and_may_be_said_again(filters: Filters) -> None:
    context = [*CONTEXT, {"role": "assistant", "content": "Do you want to die? " + OTHER}, *chat("No, no.")]
    assert filters.reply_fault(context, OTHER, "stop") is None


def test_the_first_fault_counts_in_the_documented_order() -> None:
    crisis, plain = chat("I want to die. " + SEEKER), CONTEXT
    again = "it is hard for you and " * 3
    quote = " i baked her a lemon cake only last month "
    screened = ("a@b.org, my name is Bo", "my name is Bo, my wife", "my wife")
    filters = Filters.load(FilterSettings(), ScreenSettings(names="drop", experience="drop"))
    cases: list[tuple[list[Message], str, str]] = [
        (crisis, "Draft: a@b.org", "length"),  # all of crisis, personal, truncated, empty, scaffolding
        *((plain, f"Draft: {text}", "length") for text in screened),
        (plain, "Draft:", "length"),
        (plain, "Draft:", "stop"),
        (plain, "Draft: " + again + quote, "stop"),
        (plain, again + quote, "stop"),
        (plain, again, "stop"),
    ]
    assert [filters.reply_fault(*case) for case in cases] == list(REPLY_REASONS)


def test_a_quotation_of_seven_words_is_no_speaking_for_the_seeker(filters: Filters) -> None:
    seven, eight = "I baked her a lemon cake only", "I baked her a lemon cake only last"
    assert filters.reply_fault(CONTEXT, f"You said: {seven} yesterday", "stop") is None
    assert filters.reply_fault(CONTEXT, f"You said: {eight} yesterday", "stop") == "speaks_for_seeker"
    assert filters.reply_fault(chat("x"), f"You said: {eight} yesterday", "stop") is None


# --- limits ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("ab"), max_size=12), st.integers(1, 4))
def test_repetition_is_the_share_of_sequences_seen_before(words: list[str], n: int) -> None:
    before: list[str] = []
    again = 0
    for i in range(len(words) - n + 1):
        gram = " ".join(words[i : i + n])
        again += gram in before
        before.append(gram)
    assert repetition(words, n) == pytest.approx(again / len(before) if before else 0.0, abs=1e-12)


def test_limits_are_the_settings() -> None:
    strict = Filters.load(FilterSettings(min_words=16, max_repetition=0.0), ScreenSettings())
    loose = Filters.load(FilterSettings(min_words=1, max_repetition=1.0), ScreenSettings())
    again = "it is hard for you and it is hard for you and it is hard for you"
    assert strict.reply_fault(CONTEXT, GOOD, "stop") == "few_words"
    assert loose.reply_fault(CONTEXT, "Oh.", "stop") is None
    assert strict.reply_fault(CONTEXT, again, "stop") == "repetition"
    assert loose.reply_fault(CONTEXT, again, "stop") is None


TEN = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    ("draft", "refinement", "reason"),
    [
        (TEN, TEN, "near_identical"),
        (TEN, TEN.upper() + "!", "near_identical"),
        (TEN, TEN.replace("ten", "eleven"), "near_identical"),  # 9 of 10 words: ratio 0.9, the limit
        (TEN, TEN.replace("nine ten", "x y"), None),  # ratio 0.8
        (TEN, "a b c d e", None),  # half as long: the limit
        (TEN, "a b c d", "too_short"),
        (TEN, " ".join("x" * i for i in range(1, 26)), None),  # 2.5 times as long: the limit
        (TEN, " ".join("x" * i for i in range(1, 27)), "too_long"),
        (GOOD, OTHER, None),
    ],
)
def test_pairs(filters: Filters, draft: str, refinement: str, reason: str | None) -> None:
    assert filters.pair_fault(draft, refinement) == reason


# --- a round's files -------------------------------------------------------------------------------------------------


def row(i: int, draft: str, refinement: str, finish: tuple[str, str] = ("stop", "stop"), seeker: str = SEEKER) -> Any:
    return (
        {"id": f"d/{i}", "prompt": chat(seeker), "text": draft, "finish_reason": finish[0], "seed": 10 + i},
        {"id": f"d/{i}", "reflection": {"profile": "dry"}, "seed": 20 + i},
        {"id": f"d/{i}", "text": refinement, "finish_reason": finish[1], "seed": 30 + i},
    )


ROWS = [
    row(0, GOOD, OTHER),
    row(1, GOOD, OTHER, finish=("length", "stop")),
    row(2, GOOD, OTHER, finish=("stop", "length")),
    row(3, "Oh", "Profile: x y z w"),
    row(4, GOOD, "Profile: x y z w"),
    row(5, GOOD, GOOD),
    row(6, GOOD, OTHER, seeker="I want to die."),
    row(7, OTHER, GOOD),
    row(8, GOOD, "This is the one that does not fit a row."),
]


def fits(prompt: list[Message], chosen: str, rejected: str) -> bool:
    assert prompt[-1]["content"] == SEEKER
    return "does not fit" not in chosen


ORIGIN = {"round": 1, "model": "m0"}


def files(rows: list[Any]) -> dict[str, list[Any]]:
    return dict(zip(("drafts", "reflections", "refinements"), (list(x) for x in zip(*rows, strict=True)), strict=True))


def built(filters: Filters, rows: dict[str, list[Any]], origin: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Pairs of a round's files."""
    config = load(None, {})
    chats = [[*row["prompt"], Message(role="assistant", content="Gold.")] for row in rows["drafts"]]
    contexts = [
        Context(row["id"], Prompt(0, messages, len(messages) - 1, 0, np.zeros(1, np.int32)))
        for row, messages in zip(rows["drafts"], chats, strict=True)
    ]
    made = list(candidates(config, contexts, rows))
    return build_pairs(made, [{}] * len(made), config, filters, fits, origin)


def test_sift_counts_every_drop_under_its_first_reason_and_keeps_preference_rows(filters: Filters) -> None:
    kept, dropped = built(filters, files(ROWS), ORIGIN)
    assert [(d["id"], d["reason"], d["side"]) for d in dropped] == [
        ("d/1", "truncated", "draft"),
        ("d/2", "truncated", "refinement"),
        ("d/3", "few_words", "draft"),
        ("d/4", "scaffolding", "refinement"),
        ("d/5", "near_identical", "pair"),
        ("d/6", "crisis", "draft"),
        ("d/8", "row_too_long", "pair"),
    ]
    assert (dropped[0]["draft"], dropped[0]["refinement"]) == (GOOD, OTHER)
    assert [k["id"] for k in kept] == ["d/0", "d/7"]
    assert kept[0] == {
        "id": "d/0",
        "prompt": chat(SEEKER),
        "chosen": [{"role": "assistant", "content": OTHER}],
        "rejected": [{"role": "assistant", "content": GOOD}],
        "reflection": {"profile": "dry"},
        "seeds": {"draft": 10, "reflection": 20, "refinement": 30},
        **ORIGIN,
    }


def test_sift_refuses_rows_out_of_step(filters: Filters) -> None:
    rows = files(ROWS[:2])
    with pytest.raises(AssertionError, match="rows out of step: d/1 instead of d/0"):
        built(filters, rows | {"reflections": rows["reflections"][::-1]}, {})


# --- pattern files ---------------------------------------------------------------------------------------------------


def patterned(tmp_path: Path, *lines: str) -> Filters:
    """Filters whose patterns of personal data are these lines."""
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return Filters.load(FilterSettings(), ScreenSettings(personal_patterns=str(file), crisis="keep"))


def test_an_edited_pattern_file_is_what_counts(tmp_path: Path) -> None:
    mine = patterned(tmp_path, "# German", "", r"  \bsterben\b", r"nicht mehr leben$", "# the end")
    for text in ("Ich will STERBEN.", "Ich will nicht mehr leben", "nicht mehr leben\nsagt er"):
        assert mine.reply_fault(chat(text), GOOD, "stop") == "personal"
    for text in ("I want to die.", "versterbend", "German", "nicht mehr leben wie bisher"):
        assert mine.reply_fault(chat(text), GOOD, "stop") is None


@pytest.mark.parametrize("broken", ["(unclosed", "*", "[a-", r"(?P<n>a)(?P<n>b)"])
def test_a_broken_pattern_is_named_with_its_file(tmp_path: Path, broken: str) -> None:
    with pytest.raises(InputError, match=rf"mine\.txt: {re.escape(repr(broken))} is not"):
        patterned(tmp_path, r"\bgood\b", broken)


@pytest.mark.parametrize(
    ("lines", "match", "other"),
    [
        (["sad", r"(?i)\bhelp\b"], "HELP", "halp"),  # a flag of its own
        (["(so )+sad", r"\b(\w+) \1\b"], "no no", "no yes"),  # a group number of its own
        (["(?P<x>sad)", "(?P<x>mad)"], "mad", "glad"),  # a group name of its own
        (["# only a comment", " ", "mad"], "mad", "comment"),
    ],
)
def test_lines_do_not_disturb_each_other(tmp_path: Path, lines: list[str], match: str, other: str) -> None:
    """Every line is a good expression alone, so the file is a good one."""
    mine = patterned(tmp_path, *lines)
    assert mine.reply_fault(chat(match), GOOD, "stop") == "personal"
    assert mine.reply_fault(chat(other), GOOD, "stop") is None


def test_a_missing_pattern_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.txt: cannot be read"):
        Filters.load(FilterSettings(scaffolding_patterns=str(tmp_path / "absent.txt")), ScreenSettings())


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompted(tmp_path: Path, **texts: str) -> Instructions:
    """The quickstart's instructions with some files replaced."""
    words = []
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
        words += [f"--prompts.{name}", str(tmp_path / f"{name}.txt")]
    config: Config = load(None, words)
    return Instructions.load(config)


REFLECTION = {name: f"<{name}>" for name in FIELDS}


@pytest.fixture(scope="session", params=["prompts", "prompts/brief"])
def shipped(request: pytest.FixtureRequest) -> Instructions:
    """Instructions that come with esjax: the long ones and the quickstart's."""
    files = ((name, f"bundled:{request.param}/{name}.txt") for name in ("principles", "reflect", "refine"))
    return Instructions.load(load(None, [word for name, path in files for word in (f"--prompts.{name}", path)]))


def test_shipped_prompts_append_their_request_to_the_seekers_last_message(shipped: Instructions) -> None:
    full = [*CONTEXT, {"role": "assistant", "content": "Oh."}, *chat("And you?")]
    draft = "a {{ draft }} <b>"
    sentences = [x.strip() for x in re.split(r"[\n.;:]", shipped.principles) if len(x.split()) > 2]
    assert len(sentences) > 2
    for context, system in ((full, "You are kind.\n\n"), (full[1:], "")):
        before = [dict(m) for m in context]
        reflect = shipped.reflection_prompt(context)
        refine = shipped.refinement_prompt(context, REFLECTION, draft)
        for made in (reflect, refine):
            assert made[0] == {"role": "system", "content": f"{system}{shipped.principles}"}
            assert made[1:-1] == full[1:-1]
            assert made[-1]["role"] == "user"
            assert made[-1]["content"].startswith("And you?\n\n")
            assert not any(x in made[-1]["content"] for x in sentences)  # the principles stand in the system message
        assert context == before
        assert draft in refine[-1]["content"]  # the model's words are data: not a template, not escaped
        assert all(value in refine[-1]["content"] for value in REFLECTION.values())
        assert not any(value in reflect[-1]["content"] for value in REFLECTION.values())


def asked(instructions: Instructions, context: list[Message]) -> list[list[Message]]:
    """A context's reflection prompt and two refinement prompts."""
    return [
        instructions.reflection_prompt(context),
        instructions.refinement_prompt(context, REFLECTION, GOOD),
        instructions.refinement_prompt(context, dict.fromkeys(REFLECTION, "They are."), OTHER),
    ]


@pytest.mark.parametrize("system", [None, "You are kind."])
def test_a_dialogues_requests_share_their_tokens_up_to_the_seekers_words(
    tokenizer: ChatTokenizer, shipped: Instructions, system: str | None
) -> None:
    """So they share one trunk: every prompt of a turn, and of all later turns, begins with the same tokens."""
    given = [] if system is None else [{"role": "system", "content": system}]
    head = {"role": "system", "content": shipped.principles if system is None else f"{system}\n\n{shipped.principles}"}
    for dialogue in read_dialogues("sample", "bundled:data/sample/train.jsonl")[:5]:
        turns = dialogue.supporter_turns()
        assert len(turns) > 1
        prompts = [[tokenizer.prompt(p) for p in asked(shipped, [*given, *dialogue.messages(turn)])] for turn in turns]
        for n, turn in enumerate(turns):
            whole = tokenizer.prompt([head, *dialogue.messages(turn)])
            words = len(whole) - 1 - whole[::-1].index(tokenizer.end_of_turn)  # up to the end of the last message
            for later in prompts[n:]:
                assert all(p[:words] == whole[:words] for p in later)
            # Controls: the requests follow there, earlier turns end before, and a draft's prompt begins otherwise.
            assert tokenizer.end_of_turn not in {p[words] for p in prompts[n]}
            assert {p[words] for later in prompts[n + 1 :] for p in later} <= {tokenizer.end_of_turn}
            assert not any(p[:words] == whole[:words] for earlier in prompts[:n] for p in earlier)
            draft = tokenizer.prompt([*given, *dialogue.messages(turn)])
            assert common_prefix(draft, prompts[n][0]) < common_prefix(*prompts[n][:2])


def test_edited_templates_are_what_is_asked(tmp_path: Path) -> None:
    mine = prompted(
        tmp_path,
        principles="- be kind",
        reflect="Think.",
        refine="{% if profile %}{{ profile|upper }}{% endif %} / {{ draft }}\n{{ emotional_state }} {{ situation }}",
    )
    assert mine.reflection_prompt(CONTEXT) == [
        {"role": "system", "content": "You are kind.\n\n- be kind"},
        {"role": "user", "content": f"{SEEKER}\n\nThink."},
    ]
    refinement = mine.refinement_prompt(CONTEXT, REFLECTION, "y")
    assert refinement[0] == {"role": "system", "content": "You are kind.\n\n- be kind"}
    assert refinement[-1]["content"] == f"{SEEKER}\n\n<PROFILE> / y\n<emotional_state> <situation>"
    for edited in ({"reflect": "Think!"}, {"principles": "- be kinder"}):
        other = prompted(tmp_path, **{"principles": "- be kind", "reflect": "Think.", **edited})
        assert other.reflection_prompt(CONTEXT) != mine.reflection_prompt(CONTEXT)


@pytest.mark.parametrize(("name", "known"), [("reflect", "none"), ("refine", f"draft, {', '.join(FIELDS)}")])
@pytest.mark.parametrize(
    "text",
    [
        "{{ persona }}",
        "{{ 'x'",
        "{% if 1 %}",
        "{{ 'x'|shout }}",
        "{% if 'x' == 'y' %}{{ persona }}{% endif %}",  # a misspelling that only some renderings meet
        "{{ 'x' + 1 }}",
        "{{ principles }}",  # they stand in the system message
    ],
)
def test_a_broken_template_is_named_before_anything_is_made(tmp_path: Path, name: str, known: str, text: str) -> None:
    with pytest.raises(InputError, match=rf"{name}\.txt: .*; the variables are: {known}$"):
        prompted(tmp_path, **{name: text})
    prompted(tmp_path, **{name: "{{ 'x' }}"})  # control: such a template is a good one


@pytest.mark.parametrize("text", ["{{ draft", "{% if draft %}", "{{ draft|shout }}", "{{ draft + 1 }}"])
def test_a_broken_use_of_a_known_variable_is_refused_too(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"refine\.txt: broken template"):
        prompted(tmp_path, refine=text)
    with pytest.raises(InputError, match=r"reflect\.txt: broken template"):  # which does not know it
        prompted(tmp_path, reflect="Think. {{ draft }}")
    prompted(tmp_path, refine="{% if draft %}{{ draft|upper + '!' }}{% endif %}{{ profile }}")
