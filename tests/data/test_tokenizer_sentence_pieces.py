"""SPMTokenizer on the models of Llama 2 and Mistral, against the library itself and Hugging Face's Rust conversion of the model."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece

from megatron.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from tests.data.tokenizer_texts import HARD, random_texts, real_texts

MODELS = ("llama2_tokenizer.model", "mistral_v1_tokenizer.model")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, shared_dir: Path) -> Path:
    path = shared_dir / "data" / "tokenizers" / request.param
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


def test_ids_are_the_librarys(model: Path, shared_dir: Path) -> None:
    tokenizer = load_tokenizer("SPMTokenizer", model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (tokenizer.vocab_size, tokenizer.eod) == (32000, 2)
    assert processor.id_to_piece(2) == "</s>"
    texts = [*HARD, *random_texts(2, 500), *real_texts(shared_dir)]
    expected = [processor.encode(text, out_type=int) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.encode(text) for text in texts[:100]] == expected[:100]


def test_every_text_comes_back(model: Path, shared_dir: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer("SPMTokenizer", model)
    texts = [text for text in (*HARD, *random_texts(3, 500), *real_texts(shared_dir)) if "\u2581" not in text]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert tokenizer.decode([*tokenizer.encode("the end"), 2]) == "the end"
    assert tokenizer.decode(tokenizer.encode("\u2581x")) == " x"  # SentencePiece's own sign for a space cannot be told from one


def test_hugging_faces_llama_tokenizer_agrees(shared_dir: Path, tmp_path: Path) -> None:
    """Theirs splits at spelled-out special tokens, drops a leading space, and its conversion of the model cuts runs of spaces elsewhere
    ("    if" is 268, 361 there and 1678, 565 in SentencePiece), so it gets text without those."""
    transformers = pytest.importorskip("transformers")
    shutil.copy(shared_dir / "data" / "tokenizers" / MODELS[0], tmp_path / "tokenizer.model")
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    texts = [re.sub(" {2,}", " ", text).lstrip() for text in (*HARD, *real_texts(shared_dir)[::3]) if not {"<", "\u2581"} & set(text)]
    assert len(texts) > 15
    ours = load_tokenizer("SPMTokenizer", tmp_path / "tokenizer.model")
    assert ours.encode_batch(texts) == [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert (ours.vocab_size, ours.eod) == (len(theirs), theirs.eos_token_id)


def train(path: Path, **options: object) -> Path:
    """A small model of its own."""
    model = io.BytesIO()
    sentences = [f"the {word} of the united states is {number}" for number, word in enumerate(("union", "senate", "house", "people") * 20)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=60, model_type="bpe", hard_vocab_limit=False, minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return path


def test_the_end_of_document_is_the_models(tmp_path: Path) -> None:
    assert load_tokenizer("SPMTokenizer", train(tmp_path / "usual.model")).eod == 2
    assert load_tokenizer("SPMTokenizer", train(tmp_path / "none.model", eos_id=-1)).eod is None
    named = load_tokenizer("SPMTokenizer", train(tmp_path / "named.model", control_symbols=["<|endoftext|>"]))
    assert named.eod == 3
    assert named.decode([*named.encode("the union"), 3]) == "the union"


def test_other_files_are_explained(shared_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"SPMTokenizer needs vocab_file: the path of a SentencePiece model \(tokenizer\.model\)"):
        load_tokenizer("SPMTokenizer", None)
    with pytest.raises(TokenizerError, match=r"vocab_file: no file .*none\.model; give the path of a SentencePiece model"):
        load_tokenizer("SPMTokenizer", tmp_path / "none.model")
    with pytest.raises(TokenizerError, match=r"is not a SentencePiece model \(it looks like a tiktoken file \(Llama 3's\): use TiktokenTokenizer\)"):
        load_tokenizer("SPMTokenizer", shared_dir / "data" / "tokenizers" / "llama3_tokenizer.model")
    whole = (shared_dir / "data" / "tokenizers" / MODELS[0]).read_bytes()
    for content in (b"", b"\x00\x01", b"{}", whole[:100_001]):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(TokenizerError, match=r"broken\.model is not a SentencePiece model"):
            load_tokenizer("SPMTokenizer", tmp_path / "broken.model")
