#!/usr/bin/env bash
# datasets 5.2.0: a column of texts in a .json file becomes timestamps when all of them look like dates.
#
# What was written is lost: "2026-11-30" and "2026-11-30T00:00" are the same datetime, and a single value of another form
# makes the whole column texts again. So whether two files of the same source agree on a column depends on their rows. csv keeps
# the texts.
set -euo pipefail
trap 'echo "changed at line $LINENO"' ERR
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet torch==2.13.0
env/bin/python -m pip install --quiet datasets==5.2.0
env/bin/python - <<'EOF' 2> errors.txt || { tail -3 errors.txt; exit 1; }
import json
from pathlib import Path

import datasets


def loaded(kind: str, values: list[str]):
    """Type and values of a column that was written as these texts."""
    path = Path(f"{len(values)}-{abs(hash(tuple(values)))}.{kind}")
    path.write_text("".join(f"{json.dumps({'when': value})}\n" for value in values) if kind == "json" else "\n".join(["when", *values]))
    rows = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir="cache")
    return rows.features["when"].dtype, list(rows["when"])


same = ["2026-11-30", "2026-11-30T00:00"]
kind, values = loaded("json", same)
assert kind.startswith("timestamp"), f"changed: {kind}"
assert values[0] == values[1], f"changed: {values}"
assert loaded("json", [*same, "soon"]) == ("string", [*same, "soon"])
assert loaded("csv", same) in (("string", same), ("large_string", same))
print("as described: texts that look like dates are timestamps in json, unless one does not look like a date")
EOF
