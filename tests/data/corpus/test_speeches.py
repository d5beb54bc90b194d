"""What the transcripts' editors added goes; every word that was spoken or written by the president stays."""

from __future__ import annotations

import pytest

from megatron.data.corpus.speeches import clean_speech


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("Thank you. [Applause] And now. [Laughter]", "Thank you. And now."),
        ("My only agenda—[laughter]. Audience member. [Inaudible]", "My only agenda—."),
        ("the papers [see APP Note] transaction [See APP Note.].", "the papers transaction."),
        ("It costs [caps; White House correction] more.", "It costs more."),
        ("as [to] the efficacy of [the States]", "as [to] the efficacy of [the States]"),
        ("One.\n\n[At this point, the First Lady presented a medal.]\n\nTwo.", "One.\n\nTwo."),
        ("[The 2026 U.S. men's Olympic hockey team entered.]\n\nTwo.", "Two."),
        ("[Released January 21, 1946. Dated January 14, 1946]\n\nTo the Congress:", "To the Congress:"),
        ("[ Delivered in person before a joint session at 9:04 p.m. ]\n\nMr. Speaker:", "Mr. Speaker:"),
        ("[In any event, this will save money.]", "[In any event, this will save money.]"),
        ("The President. Hello.\n\nAudience members. U.S.A.!\n\nRep. Omar. No!\n\nThe President. Yes.", "Hello.\n\nYes."),
        ("The President. Hello.\n\nRepresentative W. Andrew Ogles IV. It's your fault!", "Hello."),
        ("The President. Hello.\n\nMr. Speaker, Mr. Vice President. Hear.", "Hello.\n\nMr. Speaker, Mr. Vice President. Hear."),
        ("Representative Smith. A written message without voices.", "Representative Smith. A written message without voices."),
        ("Income $5\n Expenditures ...... $98\n\n[Laughter]", "Income $5\n Expenditures ...... $98"),
    ],
)
def test_cleaning(given: str, kept: str) -> None:
    assert clean_speech(given) == kept
