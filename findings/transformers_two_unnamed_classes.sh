#!/usr/bin/env bash
# transformers 5.23.0: a BART classifier with two classes comes back with three.
#
# BartConfig has three classes by default. save_pretrained leaves out what it takes for defaults: LABEL_0 and LABEL_1 are the
# names that any config with two classes has, so neither id2label nor a number of classes is in config.json, and from_pretrained
# builds a head of three rows (the weights of two do not fit it). Two classes with names of their own, four without, and BERT,
# whose default is two, come back as they were.
set -euo pipefail
trap 'echo "changed at line $LINENO"' ERR
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet torch==2.13.0
env/bin/python -m pip install --quiet transformers==5.23.0
env/bin/python - <<'EOF'
import json
import tempfile

from transformers import AutoConfig, BartConfig, BartForSequenceClassification, BertConfig, BertForSequenceClassification

ends = {f"{end}_{part}": 2 for end in ("encoder", "decoder") for part in ("layers", "attention_heads", "ffn_dim")}
bart = dict(vocab_size=50, d_model=8, max_position_embeddings=16, **ends)
bert = dict(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


def reloaded(model) -> tuple[int, bool]:
    """The number of classes after a round trip, and whether config.json says it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with open(f"{folder}/config.json") as file:
            written = json.load(file)
        return AutoConfig.from_pretrained(folder).num_labels, bool(written.keys() & {"id2label", "num_labels"})


names = dict(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
assert reloaded(BertForSequenceClassification(BertConfig(num_labels=2, **bert))) == (2, False)
assert reloaded(BartForSequenceClassification(BartConfig(num_labels=4, **bart))) == (4, True)
assert reloaded(BartForSequenceClassification(BartConfig(**names, **bart))) == (2, True)
found = reloaded(BartForSequenceClassification(BartConfig(num_labels=2, **bart)))
assert found == (3, False), f"changed: {found}"
print("as described: two unnamed classes of BART are three after save_pretrained and from_pretrained")
EOF
