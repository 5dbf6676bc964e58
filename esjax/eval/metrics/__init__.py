"""The table of metrics. A new one is a file here and its name in MODULES."""

from esjax.eval.metrics import (
    bleu,
    claims,
    conduct,
    distinct,
    generic,
    length,
    meteor,
    overlap,
    repeats,
    rouge,
    unhelpful,
)
from esjax.eval.metrics.judged import JUDGED
from esjax.eval.metrics.metric import Metric
from esjax.eval.metrics.reflected import REFLECTED
from esjax.eval.metrics.talks import TALKS

MODULES = (bleu, rouge, meteor, overlap, distinct, length, repeats, generic, unhelpful, claims, conduct)
# Values of these are made where a model is, or another reply to tell one from.
PERPLEXITY = Metric(
    "perplexity",
    "perplexity of the references",
    "corpus",
    "the model's tokens",
    "lower",
    "exp of the mean negative log-prob",
)
BITS = Metric(
    "bits_per_byte", "bits a byte of the references", "corpus", "UTF-8 bytes", "lower", "negative log2-prob over bytes"
)
REPLAY = Metric("replay_loss", "loss on held-out replay", "corpus", "the model's tokens", "lower", "nats a token")
DROPPED = Metric(
    "dropped", "would be dropped by the filters", "reply", "", "lower", "ours (filters, screen)", share=True
)
SPECIFICITY = Metric(
    "specificity",
    "specificity (nats a token)",
    "reply",
    "the model's tokens",
    "higher",
    "ours: log p(reply | own context) - log p(reply | another person's), under one model",
)
IDENTIFY = {
    f"{what}_{by}": Metric(
        f"{what}_{by}",
        f"own context {label}, {shown}",
        "reply",
        tokens,
        "higher",
        "ours: retrieval among other people's contexts",
        share=what == "hit",
    )
    for by, shown, tokens in (
        ("bm25", "BM25", "bm25s' words, no stop words"),
        ("embedding", "embedding", "the embedding model's"),
    )
    for what, label in (("hit", "found"), ("rank", "rank"))
}
SIMILARITY = Metric(
    "similarity",
    "likeness to the reference",
    "reply",
    "the embedding model's",
    "higher",
    "cosine of sentence embeddings",
)
WANTED = Metric(
    "discrepancy",
    "wanted and offered support differ",
    "reply",
    "the embedding model's",
    "lower",
    "ours: total variation",
)
OF_MODELS = (
    SIMILARITY,
    WANTED,
    PERPLEXITY,
    BITS,
    REPLAY,
    DROPPED,
    SPECIFICITY,
    *IDENTIFY.values(),
    *JUDGED,
    *TALKS,
    *REFLECTED,
)
METRICS = {metric.name: metric for module in MODULES for metric in module.METRICS}
ALL = METRICS | {metric.name: metric for metric in OF_MODELS}
__all__ = ["ALL", "BITS", "IDENTIFY", "METRICS", "PERPLEXITY", "REPLAY", "SPECIFICITY", "Metric"]
