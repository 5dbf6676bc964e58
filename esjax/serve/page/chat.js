"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  let messages = []; // the conversation: this page alone has it
  let seed = fresh();
  let going = null; // the request under way

  function fresh() { return crypto.getRandomValues(new Uint32Array(1))[0]; }

  function bubble(kind, who, text) {
    const node = document.createElement("div");
    node.className = `said ${kind}`;
    node.dir = "auto";
    const name = document.createElement("span");
    name.className = "who";
    name.textContent = who;
    const said = document.createElement("span");
    said.className = "text";
    said.textContent = text;
    node.append(name, said);
    $("log").append(node);
    node.scrollIntoView({ block: "end" });
    return said;
  }

  function state(busy, text = "") {
    $("status").textContent = text;
    $("send").disabled = busy;
    $("stop").hidden = !busy;
    $("new").disabled = busy;
    const none = busy || messages.length < 2;
    for (const id of ["compare", "infer", "why", "save"]) $(id).disabled = none;
  }

  async function post(path, body, signal) {
    const answer = await fetch(path, { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal });
    if (!answer.ok) {
      let told = `the server answered ${answer.status}`;
      try { told = (await answer.json()).error.message; } catch { /* no line of its own */ }
      throw new Error(told);
    }
    return answer;
  }

  // The pieces of a streamed reply; what the guard says comes as a piece, too.
  async function stream(model, chat, place, signal) {
    const answer = await post("/chat/turn", { model, messages: chat, seed: (seed + chat.length) % 2 ** 32 }, signal);
    const cut = Number(answer.headers.get("x-cut-messages") || 0);
    if (cut) $("status").textContent = `The ${cut} oldest messages no longer fit and are not read.`;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.slice(6);
        if (data === "[DONE]") continue;
        const piece = JSON.parse(data);
        if (piece.error) throw new Error(piece.error.message);
        const choice = (piece.choices || [])[0];
        if (!choice) continue;
        if (choice.delta && choice.delta.content) place.textContent += choice.delta.content;
        if (choice.guard) {
          place.parentNode.classList.add("guard");
          place.parentNode.querySelector(".who").textContent = "guard";
        }
        place.scrollIntoView({ block: "end" });
      }
    }
    return place.textContent.trim();
  }

  async function work(text, does) {
    going = new AbortController();
    state(true, text);
    try {
      await does(going.signal);
      state(false, $("status").textContent === text ? "" : $("status").textContent);
    } catch (error) {
      state(false, error.name === "AbortError" ? "Stopped." : error.message);
    }
    going = null;
    $("text").focus();
  }

  function asked() { return messages.slice(0, -1); }

  function note(title, rows) {
    bubble("note", title, Object.entries(rows).map(([k, v]) => `${k.replaceAll("_", " ")}: ${v}`).join("\n"));
  }

  $("say").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("text").value.trim();
    if (!text || going) return;
    const model = $("model").value;
    const before = messages;
    messages = [...messages, { role: "user", content: text }];
    const own = bubble("user", "you", text);
    const place = bubble("assistant", model, "");
    $("text").value = "";
    work("The model answers.", async (signal) => {
      try {
        const said = await stream(model, messages, place, signal);
        messages = [...messages, { role: "assistant", content: said || "..." }];
      } catch (error) {
        if (error.name === "AbortError" && place.textContent.trim()) {
          messages = [...messages, { role: "assistant", content: place.textContent.trim() }];
        } else { // as if nothing had been said
          messages = before;
          own.parentNode.remove();
          place.parentNode.remove();
          $("text").value = text;
        }
        throw error;
      }
    });
  });

  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      $("say").requestSubmit();
    }
  });

  $("infer").addEventListener("click", () => work("The model reflects.", async (signal) => {
    const answer = await post("/chat/infer", { model: $("model").value, messages: asked(), seed }, signal);
    note("What the model would infer of you", await answer.json());
  }));

  $("why").addEventListener("click", () => work("The model reflects and refines.", async (signal) => {
    const draft = messages[messages.length - 1].content;
    const made = await (await post("/chat/why", { model: $("model").value, messages: asked(), seed, draft }, signal)).json();
    note("What stands behind this reply", { ...made.reflection, draft: made.draft, refined: made.refinement });
  }));

  $("compare").addEventListener("click", () => work("The other model answers.", async (signal) => {
    const other = $("other").value.trim() || "m0";
    const known = [...$("model").options].map((o) => o.value);
    if (!known.includes(other)) {
      await post(`/chat/open/${encodeURIComponent(other)}`, {}, signal);
      const option = document.createElement("option");
      option.textContent = other;
      $("model").append(option);
    }
    const sides = document.createElement("div");
    sides.className = "sides";
    const mine = bubble("note", $("model").value, messages[messages.length - 1].content);
    const theirs = bubble("note", other, "");
    sides.append(mine.parentNode, theirs.parentNode);
    $("log").append(sides);
    await stream(other, asked(), theirs, signal);
  }));

  $("save").addEventListener("click", () => {
    const file = new Blob([JSON.stringify({ model: $("model").value, messages }, null, 1)], { type: "application/json" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(file);
    link.download = "conversation.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  $("new").addEventListener("click", () => {
    messages = [];
    seed = fresh();
    $("log").replaceChildren();
    state(false, "A new conversation; the model knows nothing of the last one.");
    $("text").focus();
  });

  $("stop").addEventListener("click", () => going && going.abort());
  $("which").addEventListener("submit", (event) => event.preventDefault());
  state(false);
  $("text").focus();
})();
