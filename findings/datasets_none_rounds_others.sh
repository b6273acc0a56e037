#!/usr/bin/env bash
# datasets 5.2.0: a None in one row changes the whole numbers of the other rows that are read with it.
#
# With the format torch (or numpy) a column of int64 is int64 for any row alone. Read with a row whose value is None, all of them are
# float32, and 16777217 is 16777216. DataLoader reads a batch at once (`__getitems__`), so an id or a label depends on which
# rows the shuffle has put beside it, and so does the type of the batch; lists of whole numbers do the same.
set -euo pipefail
trap 'echo "changed at line $LINENO"' ERR
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet torch==2.13.0
env/bin/python -m pip install --quiet datasets==5.2.0
env/bin/python - <<'EOS' 2> errors.txt || { tail -3 errors.txt; exit 1; }
import datasets
import torch
from torch.utils.data import DataLoader

rows = datasets.Dataset.from_dict({"id": [16_777_217, 5, None], "ids": [[16_777_217], [5], [None]]}).with_format("torch")
for name in ("id", "ids"):
    alone = rows[0][name]
    assert alone.dtype == torch.int64 and alone.sum() == 16_777_217, f"changed: {alone}"
    batches = [batch[name] for order in ([0, 1], [0, 2]) for batch in DataLoader(rows, sampler=order, batch_size=2)]
    print(f"{name}: row 0 is {alone.tolist()} alone, {batches[0][0].tolist()} beside 5, {batches[1][0].tolist()} beside None")
    assert batches[0].dtype == torch.int64 and batches[0][0].sum() == 16_777_217, f"changed: {batches[0]}"
    assert batches[1].dtype == torch.float32 and batches[1][0].sum() == 16_777_216, f"changed: {batches[1]}"
print("as described: whole numbers that are read with a None are float32, and rounded")
EOS
