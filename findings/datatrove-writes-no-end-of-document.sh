#!/usr/bin/env bash
# datatrove 0.10.1. `DocumentTokenizer(output_folder, tokenizer)` tokenises a corpus for training.
# A good engineer guesses what its docstring says: <|endoftext|> follows each document by default.
# What happens: the default is None, and nothing stands between the documents. Nanoset reads the stream across them.
# With eos_token a second thing happens: where a `no_loss_ranges` range reaches the end of a document, this text is cut off, and the end token with it.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check datatrove==0.10.1 tokenizers==0.23.3 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
import inspect
from datatrove.data import Document
from datatrove.pipeline.tokens import DocumentTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

library = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3, "<|endoftext|>": 9}, unk_token="a"))
library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
library.add_special_tokens(["<|endoftext|>"])
library.save("tokenizer.json")


def tokens(name, documents, **given):
    DocumentTokenizer(name, "tokenizer.json", shuffle_documents=False, **given).run(iter(documents))
    data = open(f"{name}/00000_unshuffled.ds", "rb").read()
    return [int.from_bytes(data[place : place + 2], "little") for place in range(0, len(data), 2)]


said = next(line.strip() for line in inspect.getdoc(DocumentTokenizer).splitlines() if "eos_token" in line)
print("documented:", said)
two = [Document(text="a b", id="1"), Document(text="c d", id="2")]
print("tokens by default:", tokens("default", two))
print("with eos_token:", tokens("told", two, eos_token="<|endoftext|>"))
masked = [Document(text="a b c d", id="1", metadata={"no_loss_ranges": [(4, 7)]}), Document(text="c d", id="2")]
print("with eos_token, and no loss for 'c d' at the end of the first:", tokens("masked", masked, eos_token="<|endoftext|>", save_loss_metadata=True))
PYTHON
cd "$work"
venv/bin/python run.py 2>/dev/null > seen
cat seen
diff seen - <<'EXPECTED'
documented: eos_token (str): whether to add the EOS token after each document (default: "<|endoftext|>")
tokens by default: [0, 1, 2, 3]
with eos_token: [0, 1, 9, 2, 3, 9]
with eos_token, and no loss for 'c d' at the end of the first: [0, 1, 2, 3, 9]
EXPECTED
echo "as described"
