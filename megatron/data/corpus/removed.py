"""The data sets that GPT-NeoX's prepare_data.py knows but that can no longer be downloaded."""

from __future__ import annotations

PILE = "The Pile and its parts were withdrawn by their host in 2023"
PILE_PARTS = (
    *("pile", "pile_subset", "enron", "github", "arxiv", "europarl", "freelaw", "nih", "pubmed", "books1", "books3", "hackernews", "openwebtext2"),
    *("stackexchange", "ubuntu_irc", "youtube_subtitles"),
)
INSTEAD = {
    "pile": "slimpajama or fineweb-edu",
    "pile_subset": "redpajama, a sample of a billion tokens",
    "openwebtext2": "fineweb",
    "c4_openwebtext": "c4 and fineweb, blended with train_data_weights",
    **dict.fromkeys(("github", "arxiv", "books1", "books3", "stackexchange"), "slimpajama, which has such text in it"),
}
REASONS = {**dict.fromkeys(PILE_PARTS, PILE), "c4_openwebtext": "The mixture of C4 and OpenWebText was withdrawn by its host"}


def why_removed(name: str) -> str | None:
    """A sentence for a data set that is gone, with what to use instead; None for any other name."""
    reason = REASONS.get(name)
    if reason is None:
        return None
    instead = INSTEAD.get(name, "fineweb-edu or slimpajama")
    return (
        f"{name!r}: {reason}, so it cannot be downloaded. Use {instead}; or prepare a copy that you have: python prepare_data.py FOLDER --name {name}"
    )
