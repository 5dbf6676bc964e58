"""Text to rows: targets, cut histories, templates that do not share prefixes, pairs, batches, and tokens as bytes."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, WithTemplate, context, examples, pair_ids, read_dialogues, sample_texts, target
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from esjax import rows
from esjax.corpus.dialogue import OPENING, Dialogue, Message, Turn
from esjax.errors import InputError
from esjax.rows import Rows
from esjax.tokens import batches
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer

SYSTEM = "You are kind."
# A header with the number of user messages: every context has another one, so contexts are no prefixes of the dialogue.
UNSHARED = (
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} asked<|im_end|>\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}" + CHAT_TEMPLATE
)
NO_PREFIX = "{{ messages | length }}" + CHAT_TEMPLATE  # the answered chat begins differently from its prompt
NO_END = CHAT_TEMPLATE.replace("<|im_end|>", "")


def dialogue(*texts: str, first: int = 0) -> Dialogue:
    """Turns of the seeker and the supporter; ``first`` is 1 where the supporter begins."""
    return Dialogue("d", tuple(Turn(("seeker", "supporter")[i % 2], text) for i, text in enumerate(texts, first)))


SHORT = dialogue("The boxes win.", "Which box?", "The one marked misc.", "Ah.")
OPENED = dialogue("Hello you.", "I moved.", "Where to?", "A kitchen.", first=1)


@pytest.fixture(scope="session")
def dialogues() -> list[Dialogue]:
    return read_dialogues("sample", "bundled:data/sample/test.jsonl")


def shown(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    """Text with special tokens left in."""
    return str(tokenizer.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def targets(tokenizer: ChatTokenizer, row: Rows) -> list[str]:
    """The texts of a row's runs of target tokens, special tokens left in."""
    runs: list[list[int]] = []
    for i, weight in enumerate(row.weight):
        if weight:
            if i == 0 or not row.weight[i - 1]:
                runs.append([])
            runs[-1].append(int(row.tokens[i + 1]))
    return [shown(tokenizer, run) for run in runs]


def answers_in(text: str) -> list[str]:
    """Oracle: what stands between an assistant's header and the end of the turn, in a chat's text."""
    return re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, flags=re.DOTALL)


# --- dialogues to rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_exactly_supporters_turns_are_targets(tokenizer: ChatTokenizer, dialogues: list[Dialogue], system: str) -> None:
    encoder = Encoder(tokenizer, 4096, system)
    for dialogue in [SHORT, *dialogues]:
        (row,) = examples(encoder, dialogue)
        texts = [t.text + "<|im_end|>" for t in dialogue.turns if t.role == "supporter"]
        assert targets(tokenizer, row) == texts == answers_in(shown(tokenizer, list(row.tokens)))
        assert texts != [t.text + "<|im_end|>" for t in dialogue.turns if t.role == "seeker"]
        assert (shown(tokenizer, list(row.tokens)).count(SYSTEM) == 1) == bool(system)
        assert set(row.weight.tolist()) == {0.0, 1.0}
        rows.check(rows.stack([row]))
    assert encoder.counts["cut"] == encoder.counts["too_long"] == encoder.counts["unshared"] == 0


def test_the_row_is_the_templates_text(tokenizer: ChatTokenizer) -> None:
    """Oracle: what transformers makes of the chat, up to the last end of turn."""
    encoder = Encoder(tokenizer, 4096, SYSTEM)
    (row,) = examples(encoder, SHORT)
    text = tokenizer.hf.apply_chat_template(context(encoder, SHORT, 4), tokenize=False)
    assert shown(tokenizer, list(row.tokens)) == text.removesuffix("\n") != text


def test_an_opening_turn_is_no_target_and_a_closing_seeker_turn_is_left_out(tokenizer: ChatTokenizer) -> None:
    (row,) = examples(Encoder(tokenizer, 4096, ""), OPENED)
    text = shown(tokenizer, list(row.tokens))
    assert targets(tokenizer, row) == ["Where to?<|im_end|>"]
    assert answers_in(text) == ["Hello you.<|im_end|>", "Where to?<|im_end|>"]
    assert OPENING in text
    assert "A kitchen." not in text


def test_a_turns_context_has_the_system_message_or_its_own(tokenizer: ChatTokenizer) -> None:
    encoder = Encoder(tokenizer, 4096, SYSTEM)
    own: list[Message] = [{"role": "system", "content": "Be brief."}, *SHORT.messages(3)]
    assert encoder.with_system(own) == own
    assert (
        context(encoder, SHORT, 3) == encoder.with_system(own[1:]) == [{"role": "system", "content": SYSTEM}, *own[1:]]
    )
    assert Encoder(tokenizer, 4096, "").with_system(own[1:]) == own[1:]


def test_scoring_rows_have_the_last_message_as_their_only_target(tokenizer: ChatTokenizer) -> None:
    encoder = Encoder(tokenizer, 64, "")
    chat = SHORT.messages(4)
    row = target(encoder, chat)
    assert targets(tokenizer, row) == ["Ah.<|im_end|>"]
    assert shown(tokenizer, list(row.tokens)).endswith("<|im_start|>assistant\nAh.<|im_end|>")
    with pytest.raises(InputError, match=r"the last two messages do not fit data\.window=64"):
        target(encoder, [*chat[:-2], {"role": "user", "content": "word " * 99}, chat[-1]])


# --- the window ------------------------------------------------------------------------------------------------------


def longest_that_fits(tokenizer: ChatTokenizer, chat: list[Message], room: int) -> list[Message] | None:
    """Oracle: the chat without as few of its oldest turns as possible; each way to cut begins with a user's message."""
    head = [m for m in chat if m["role"] == "system"]
    starts = [i for i, m in enumerate(chat) if m["role"] == "user"]
    for start in starts:
        kept = [*head, *chat[start:]]
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in kept) + "<|im_start|>assistant\n"
        if len(tokenizer.hf(text, add_special_tokens=False).input_ids) <= room:
            return kept
    return None


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_histories_are_cut_at_turns_and_counted(
    tokenizer: ChatTokenizer, dialogues: list[Dialogue], system: str
) -> None:
    seen: Counter[str] = Counter()
    for dialogue in [*dialogues[:3], OPENED]:
        for turn in dialogue.supporter_turns():
            for room in (16, 40, 90, 200, 10_000):
                encoder = Encoder(tokenizer, 4096, system)
                chat = context(encoder, dialogue, turn)
                last = dialogue.turns[: turn + 1]
                asked = encoder.chat(Dialogue("d", last))._replace(answers=(len(chat),))
                got, expected = encoder.prompts([asked], room), longest_that_fits(tokenizer, chat, room)
                assert [p.messages for p in got] == ([expected] if expected else [])
                case = "too_long" if expected is None else "whole" if expected == chat else "cut"
                seen[case] += 1
                assert +encoder.counts == ({} if case == "whole" else {case: 1})
                for prompt in got:
                    assert len(prompt.ids) <= room
                    assert prompt.ids.tolist() == tokenizer.prompt(prompt.messages)
                    assert prompt.messages[-1] == chat[-1]
                    assert (prompt.messages[0]["role"] == "system") == bool(system)
    assert min(seen["whole"], seen["cut"], seen["too_long"]) > 3  # all three cases occurred


def test_training_rows_are_cut_and_keep_the_newest_answer(tokenizer: ChatTokenizer, dialogues: list[Dialogue]) -> None:
    encoder = Encoder(tokenizer, 200, SYSTEM)
    kept = 0
    for dialogue in dialogues:
        (row,) = examples(encoder, dialogue)
        assert len(row.tokens) <= 200
        every = [t.text + "<|im_end|>" for t in dialogue.turns if t.role == "supporter"]
        got = targets(tokenizer, row)
        assert got == every[-len(got) :]
        assert shown(tokenizer, list(row.tokens)).startswith(
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
        )
        kept += len(got)
    assert encoder.counts["cut"] == len(dialogues)
    assert kept < sum(len(d.supporter_turns()) for d in dialogues)


def test_a_row_fills_the_window_to_the_token(tokenizer: ChatTokenizer) -> None:
    """Control of the bound: the window at which nothing is cut is at most two tokens above the row's length."""
    (whole,) = examples(Encoder(tokenizer, 4096, ""), SHORT)
    n = len(whole.tokens)
    roomy, tight = Encoder(tokenizer, n + 2, ""), Encoder(tokenizer, n - 1, "")
    (row,) = examples(roomy, SHORT)
    assert row.tokens.tolist() == whole.tokens.tolist()
    (short,) = examples(tight, SHORT)
    assert len(short.tokens) < n
    assert tight.counts["cut"] == 1


def test_what_is_too_long_even_alone_is_left_out_and_counted(tokenizer: ChatTokenizer) -> None:
    long = dialogue("a b c", "d", "word " * 80, "e")
    encoder = Encoder(tokenizer, 64, SYSTEM)
    assert examples(encoder, long) == []
    assert encoder.counts["too_long"] == 1
    assert [p.stop for p in encoder.prompts([encoder.chat(long)], 64)] == [2]  # of two contexts the first fits
    assert encoder.counts["too_long"] == 2
    assert len(examples(Encoder(tokenizer, 256, SYSTEM), long)) == 1


# --- templates -------------------------------------------------------------------------------------------------------


def test_an_unstable_template_gets_a_row_a_turn(
    tokenizer: ChatTokenizer, with_template: WithTemplate, dialogues: list[Dialogue]
) -> None:
    other = with_template(UNSHARED)
    encoder = Encoder(other, 4096, "")
    dialogue = dialogues[0]
    got = examples(encoder, dialogue)
    turns = dialogue.supporter_turns()
    assert encoder.counts["unshared"] == 1
    assert len(got) == len(turns) > 1
    for n, (row, turn) in enumerate(zip(got, turns, strict=True), start=1):
        text = shown(other, list(row.tokens))
        assert text.startswith(f"{n} asked<|im_end|>\n")
        assert targets(other, row) == [dialogue.turns[turn].text + "<|im_end|>"]
        assert len(answers_in(text)) == n
    (opened,) = examples(encoder, OPENED)  # an opening turn is no target under such a template either
    assert targets(other, opened) == ["Where to?<|im_end|>"]
    (shared,) = examples(Encoder(tokenizer, 4096, ""), dialogue)
    assert sum(int(row.weight.sum()) for row in got) == int(shared.weight.sum())


def test_a_template_whose_prompt_is_no_prefix_is_refused(with_template: WithTemplate) -> None:
    encoder = Encoder(with_template(NO_PREFIX), 4096, "")
    for encode in (
        lambda: examples(encoder, SHORT),
        lambda: pair_ids(encoder, SHORT.messages(3), "a", "b"),
        lambda: target(encoder, SHORT.messages(4)),
    ):
        with pytest.raises(InputError, match="does not keep a prompt as a prefix"):
            encode()
    with pytest.raises(InputError, match=r"does not end an answer with the eos token '<\|im_end\|>'"):
        examples(Encoder(with_template(NO_END), 4096, ""), SHORT)
    assert len(examples(Encoder(with_template(CHAT_TEMPLATE), 4096, ""), SHORT)) == 1


def test_folders_without_a_usable_tokenizer_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no usable tokenizer"):
        ChatTokenizer(tmp_path)
    for missing, message in (("chat_template", "no chat template"), ("eos_token", "no eos token")):
        folder = tmp_path / missing
        hf = ChatTokenizer(tiny_folder).hf
        hf.chat_template = NO_END  # a template that ends its answers says what to use, even without an eos token
        setattr(hf, missing, None)
        hf.save_pretrained(folder)
        with pytest.raises(InputError, match=message):
            ChatTokenizer(folder)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_a_pair_has_one_prompt_and_two_ended_replies(tokenizer: ChatTokenizer) -> None:
    prompt = context(Encoder(tokenizer, 4096, SYSTEM), SHORT, 3)
    row = rows.prompt_with_replies(*pair_ids(Encoder(tokenizer, 4096, SYSTEM), prompt, "Better and longer.", "Worse."))
    ids = tokenizer.prompt(prompt)
    stem = [int(t) for t, b in zip(row.tokens, row.branch, strict=True) if b == 0]
    for branch, text in ((1, "Better and longer."), (2, "Worse.")):
        mine = [int(t) for t, b in zip(row.tokens, row.branch, strict=True) if b == branch]
        assert [*stem, mine[0]] == ids  # the prompt's last token opens the branch
        assert mine[-1] == tokenizer.end_of_turn
        assert tokenizer.decode(mine[1:]) == text
        whole = tokenizer.hf.apply_chat_template([*prompt, {"role": "assistant", "content": text}], tokenize=False)
        assert shown(tokenizer, [*stem, *mine]) + "\n" == whole
        weights = [float(w) for w, b in zip(row.weight, row.branch, strict=True) if b == branch]
        assert weights == [1.0] * (len(mine) - 1) + [0.0]
    rows.check(rows.stack([row]))
    other = rows.prompt_with_replies(
        *pair_ids(Encoder(tokenizer, 4096, ""), prompt[1:], "Better and longer.", "Worse.")
    )
    assert other.tokens.tolist() != row.tokens.tolist()
    turned = rows.prompt_with_replies(
        *pair_ids(Encoder(tokenizer, 4096, SYSTEM), prompt, "Worse.", "Better and longer.")
    )
    assert turned.tokens.tolist() != row.tokens.tolist()


# --- batches ---------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(20, 50), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_every_epoch_sees_every_example_once_within_the_rows(
    lengths: list[int], row_length: int, batch_rows: int, epochs: int, seed: int
) -> None:
    steps = batches.schedule(lengths, row_length, batch_rows, epochs, seed)
    flat = [i for step in steps for row in step for i in row]
    n = len(lengths)
    assert len(flat) == epochs * n
    for epoch in range(epochs):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert all(1 <= len(step) <= batch_rows for step in steps)
    assert all(row and sum(lengths[i] for i in row) <= row_length for step in steps for row in step)
    assert flat[:-1] != flat  # and steps do not straddle epochs:
    done = np.cumsum([sum(map(len, step)) for step in steps])
    assert {n * e for e in range(1, epochs + 1)} <= set(done.tolist())


def test_the_schedule_is_a_function_of_the_seed() -> None:
    lengths = [int(x) for x in np.random.default_rng(0).integers(1, 20, 50)]
    first = batches.schedule(lengths, 40, 4, 2, seed=3)
    assert batches.schedule(lengths, 40, 4, 2, seed=3) == first
    assert batches.schedule(lengths, 40, 4, 2, seed=4) != first
    once = batches.schedule(lengths, 40, 4, 1, seed=3)
    assert first[: len(once)] == once  # more epochs leave the first as it is
    assert first[len(once) :] != once  # and every epoch has its own order


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(20, 50), st.integers(0, 3))
def test_packing_loses_nothing_and_is_no_worse_than_best_fit(lengths: list[int], row_length: int, seed: int) -> None:
    """Oracle: best-fit decreasing, written out."""
    packed = batches.pack(lengths, row_length, (seed,))
    assert sorted(i for row in packed for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= row_length for row in packed)
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        room = [free for free in left if free >= length]
        left.append(row_length)
        tightest = min(room, default=row_length)
        left.remove(tightest if room else row_length)
        if room:
            left.remove(row_length)
        left.append(tightest - length)
    assert math.ceil(sum(lengths) / row_length) <= len(packed) <= len(left)
    assert packed == batches.pack(lengths, row_length, (seed,))


def test_packing_fills_what_best_fit_leaves_empty() -> None:
    """Rows that were cut into three parts each can be filled to the last token, which best-fit decreasing does not find."""
    rng = np.random.default_rng(0)
    parts = [(int(a), int(b), int(1000 - a - b)) for a, b in rng.integers(250, 420, (60, 2))]
    lengths = [n for three in parts for n in three]
    fitted = batches._best_fit(sorted(range(180), key=lambda i: -lengths[i]), np.asarray(lengths), 1000)
    assert len(batches.pack(lengths, 1000)) <= 61 < 63 < len(fitted)


def test_batches_hold_every_example_where_the_packing_says() -> None:
    made_of = [rows.trunk([100 + i] * n, [1.0] * (n - 1) + [0.0]) for i, n in enumerate((5, 9, 4, 4, 9, 2))]
    found: dict[int, list[int]] = {}
    packed = batches.pack([len(e.tokens) for e in made_of], row_length=10)
    for start in range(0, len(packed), 2):
        now = packed[start : start + 2]
        made = batches.batch(made_of, now, row_length=10, which=range(3))
        assert made.tokens.shape == (3, 10)
        for r, members in enumerate(now):
            for segment, i in enumerate(members, start=1):
                found[i] = made.tokens[r][made.segment[r] == segment].tolist()
        for filling in range(len(now), 3):  # a step is filled up with empty rows
            assert not made.segment[filling].any()
            assert not made.weight[filling].any()
        assert made.weight[: len(now)].any(axis=1).all()
    assert found == {i: e.tokens.tolist() for i, e in enumerate(made_of)}
    assert found != {i: e.tokens.tolist() for i, e in enumerate(made_of[::-1])}


@pytest.mark.parametrize("hosts", [1, 2, 8])
def test_the_rows_of_all_hosts_are_the_step_s(hosts: int) -> None:
    """Step i is the same global batch, however many hosts build their shares of it."""
    made_of = [rows.trunk([100 + i] * n, [1.0] * (n - 1) + [0.0]) for i, n in enumerate([5, 9, 4, 4, 9, 2] * 5)]
    for step in batches.schedule([len(e.tokens) for e in made_of], 10, 8, 2, seed=1):
        whole = batches.batch(made_of, step, 10, range(8))
        share = 8 // hosts
        parts = [batches.batch(made_of, step, 10, range(h * share, (h + 1) * share)) for h in range(hosts)]
        for name, field in zip(rows.Rows._fields, whole, strict=True):
            assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), field)


def test_real_dialogues_fill_their_rows(esconv: Path, smollm_folder: Path) -> None:
    encoder = Encoder(ChatTokenizer(smollm_folder), 2048, SYSTEM)
    for name in ("train_part", "valid"):
        dialogues = read_dialogues("esconv", str(esconv / f"{name}.jsonl"))
        lengths = [len(row.tokens) for made in encoder.examples([encoder.chat(d) for d in dialogues]) for row in made]
        steps = batches.schedule(lengths, 2048, 8, 1, seed=0)
        assert batches.fill_rate(lengths, steps, 2048) >= 0.97, (name, sum(lengths))


def test_an_example_longer_than_a_row_is_bad_input() -> None:
    """Foreign pairs come from a file (``esjax dpo --pairs``), so their lengths are anybody's."""
    with pytest.raises(InputError, match="11 tokens"):
        batches.pack([5, 11], row_length=10)
    with pytest.raises(InputError, match="11 tokens"):
        batches.schedule([5, 11], row_length=10, batch_rows=2, epochs=1, seed=0)
    assert len(batches.pack([5, 11], row_length=11)) == 2


# --- bytes -----------------------------------------------------------------------------------------------------------

TEXTS = [" a b", "naïve café — “quotes” 👋🏽", "tab\tand\nnewline  two spaces", "", "x=1; y<2 | z~^`\\"]


def save_sentencepiece(folder: Path) -> None:
    """A character-level vocabulary with byte fallback, and a space put before every text, as Llama 2 and Mistral have."""
    names = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], "▁", *map(chr, range(33, 127))]
    vocab = {n: i for i, n in enumerate(names)}
    core = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **ends).save_pretrained(folder)


def test_token_bytes_are_what_decode_says(tokenizer: ChatTokenizer) -> None:
    table = tokenizer.token_bytes()
    for text in [*TEXTS, *sample_texts()[:200]]:
        ids = tokenizer.encode(text)
        assert b"".join(table[i] for i in ids) == text.encode()
        assert tokenizer.decode(ids) == text
    whole = 0
    for i, content in table.items():
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue  # a part of a character
        whole += 1
        assert tokenizer.decode([i]) == text
    assert whole > 800
    ids = tokenizer.encode(TEXTS[1])
    assert b"".join(table[i] for i in ids[:-1]) != TEXTS[1].encode()
    vocabulary = tokenizer.hf.get_vocab()
    start, end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
    assert {start, end} == set(vocabulary.values()) - set(table)  # special tokens have none
    assert tokenizer.decode([end, *tokenizer.encode("a"), start]) == "a"


def test_token_bytes_of_a_vocabulary_with_byte_fallback(tmp_path: Path) -> None:
    save_sentencepiece(tmp_path)
    tokenizer = ChatTokenizer(tmp_path)
    table = tokenizer.token_bytes()
    for text in TEXTS[1:]:
        ids = tokenizer.encode(text)
        assert b"".join(table[i] for i in ids).decode().removeprefix(" ") == text
        assert tokenizer.decode(ids) == text
    assert table[tokenizer.hf.get_vocab()["<0x0A>"]] == b"\n"
    assert table[tokenizer.hf.get_vocab()["▁"]] == b" "


def test_a_decoder_of_another_kind_is_refused(tiny_folder: Path) -> None:
    tokenizer = ChatTokenizer(tiny_folder)
    tokenizer.hf.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="constrained decoding does not know this tokenizer's decoder"):
        tokenizer.token_bytes()
