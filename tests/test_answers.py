"""A dialogue is encoded once: what is cut out of it is what each prompt and answer gives alone, under every kind of template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, WithTemplate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esjax.corpus.dialogue import Message
from esjax.tokens import answers
from esjax.tokens.answers import CHAT, END, MESSAGE, PROMPT, START, Chat, cut_out, stored
from esjax.tokens.skeleton import Skeletons
from esjax.tokens.tokenizer import ChatTokenizer

# The kinds of templates there are, with the control tokens of the tests' tokenizer: Llama 3's headers; Mistral's, whose system
# message stands within the first user's; Gemma's, which trims; one that shows how many messages there are; one that leaves the
# reasoning of earlier answers out; one whose header merges with what an answer may begin with.
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "llama3": "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_start|>\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}",
    "mistral": "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] + '\n\n' %}{% elif m['role'] == 'user' %}"
    "<|im_start|>[INST] {{ ns.system + m['content'] }}[/INST]<|im_start|>{% set ns.system = '' %}"
    "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}",
    "gemma": "{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    "counting": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} asked<|im_end|>\n"
    + CHAT_TEMPLATE,
    "last": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}(last) {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "merging": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}
STABLE = {"chatml", "llama3", "mistral", "gemma"}
TEXTS = st.text("ab .!\n?é\u2028", min_size=1, max_size=12) | st.sampled_from(
    [
        "<|im_end|>",
        "I see.",
        "a<|im_start|>b",
        "assistant",
        " x ",
        "\n\nfar",
        "message-0-of-these",
        "⟦",
        "I am so sorry to hear that, truly.",
    ]
)


def chats(system: str, *texts: str) -> Chat:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Chat(messages, tuple(i for i, m in enumerate(messages) if m["role"] == "assistant"), "here")


def alone(tokenizer: ChatTokenizer, chat: Chat, room: int) -> dict[int, tuple[int, list[int], list[int]]]:
    """Oracle: each answer by itself. Of the chats without as few of the oldest turns as possible the first whose prompt fits:
    where it begins, its prompt's tokens and the answer's."""
    out = {}
    for answer in chat.answers:
        users = [i for i in range(chat.head, answer) if chat.messages[i]["role"] == "user"]
        for start in users:
            kept = [*chat.messages[: chat.head], *chat.messages[start : answer + 1]]
            prompt = tokenizer.prompt(kept[:-1])
            if len(prompt) <= room:
                out[answer] = (start, prompt, tokenizer.reply(prompt, kept))
                break
    return out


def found(made: answers.Answers) -> dict[tuple[int, int], tuple[int, list[int], list[int]]]:
    return {
        (row[CHAT], row[MESSAGE]): (row[START], made.prompt(row).tolist(), made.ids[row[PROMPT] : row[END]].tolist())
        for row in made.table.tolist()
    }


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    from conftest import save_tokenizer

    out = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp(name)
        hf = save_tokenizer(folder)
        hf.chat_template = template
        hf.save_pretrained(folder)
        out[name] = ChatTokenizer(folder)
    return out


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_cut_out_is_what_each_gives_alone(tokenizers: dict[str, ChatTokenizer], name: str, data: Any) -> None:
    tokenizer = tokenizers[name]
    given_chats = [
        chats(data.draw(st.sampled_from(["", "Be kind."])), *data.draw(st.lists(TEXTS, min_size=2, max_size=8)))
        for _ in range(3)
    ]
    room = data.draw(st.sampled_from([12, 30, 60, 10_000]))
    expected = {
        (n, answer): value
        for n, chat in enumerate(given_chats)
        for answer, value in alone(tokenizer, chat, room).items()
    }
    assert found(cut_out(Skeletons(tokenizer), given_chats, room, whole=False)) == expected
    # An answer's tokens hold one control token, the end of the turn, whatever people wrote.
    control = {tokenizer.hf.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>")}
    assert all(control & {*reply} == {reply[-1]} == {tokenizer.end_of_turn} for _, _, reply in expected.values())


@pytest.mark.parametrize("name", TEMPLATES)
def test_which_templates_are_encoded_once(
    tokenizers: dict[str, ChatTokenizer], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: of a stable template no prompt is encoded alone, of the others every one is."""
    asked: list[Any] = []
    prompt = ChatTokenizer.prompt
    monkeypatch.setattr(ChatTokenizer, "prompt", lambda self, m: asked.append(m) or prompt(self, m))
    given_chats = [chats("Be kind.", *(f"text {i}" for i in range(8)))] * 3
    made = cut_out(Skeletons(tokenizers[name]), given_chats, 10_000, whole=False)
    assert len(made.table) == 12
    assert bool(asked) == (name not in STABLE)
    whole = cut_out(Skeletons(tokenizers[name]), given_chats, 10_000, whole=True)
    assert whole.counts.get("unshared", 0) == (3 if name in ("counting", "last", "merging") else 0)


def test_whole_chats_are_cut_to_the_window(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer, chat = tokenizers["chatml"], chats("Be kind.", *(f"text number {i}" for i in range(10)))
    sizes = {}
    for start in range(1, 11, 2):
        kept = [chat.messages[0], *chat.messages[start:]]
        prompt = tokenizer.prompt(kept[:-1])
        sizes[start] = len(prompt) + len(tokenizer.reply(prompt, kept))
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())
    for start, size in sizes.items():
        for room, first in ((size, start), (size - 1, start + 2)):
            made = cut_out(Skeletons(tokenizer), [chat], room, whole=True)
            assert made.table[:, START].tolist() == [first] * len(made.table)
            assert made.table[:, MESSAGE].tolist() == [a for a in chat.answers if a > first]
            assert made.counts == ({} if first == 1 else {"too_long": 1} if first > 9 else {"cut": 1})


def test_a_corpus_is_encoded_once_and_read_from_the_disk(
    tokenizers: dict[str, ChatTokenizer], with_template: WithTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    cut = answers.cut_out
    monkeypatch.setattr(answers, "cut_out", lambda *a: encoded.append(len(a[1])) or cut(*a))
    given_chats = [chats("", "a", "b", "c", "d"), chats("", "e", "f")]

    def get(tokenizer: ChatTokenizer, of: list[Chat], room: int = 60, whole: bool = False) -> answers.Answers:
        return stored(tmp_path / "tokens", Skeletons(tokenizer), of, room, whole)

    first, again = get(tokenizers["chatml"], given_chats), get(tokenizers["chatml"], given_chats)
    assert encoded == [2]
    assert found(first) == found(again) == found(cut(Skeletons(tokenizers["chatml"]), given_chats, 60, False))
    assert isinstance(again.ids, np.memmap)
    get(tokenizers["llama3"], given_chats)  # whatever it hangs on
    get(tokenizers["chatml"], given_chats, room=50)
    get(tokenizers["chatml"], given_chats, whole=True)
    get(tokenizers["chatml"], given_chats[::-1])
    get(tokenizers["chatml"], [given_chats[0]._replace(answers=(3,)), given_chats[1]])
    assert encoded == [2] * 6
