#!/usr/bin/env bash
# datasets 5.2.0: imagefolder leaves rows out without a word: images that end in .avif, class folders that are links, and
# those whose names begin with two underscores.
#
# A folder of four classes with two images each, all of which PIL opens, gives the rows of the one class that is left.
set -euo pipefail
trap 'echo "changed at line $LINENO"' ERR
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet torch==2.13.0
env/bin/python -m pip install --quiet datasets==5.2.0
env/bin/python -m pip install --quiet pillow==13.0.0
env/bin/python - <<'EOF' 2> said.txt
from pathlib import Path

import datasets
from PIL import Image, features

assert features.check("avif")
root = Path("images")
for folder, suffix in (("cats", "png"), ("birds", "avif"), ("__dogs", "png"), ("elsewhere/fish", "png")):
    place = Path(folder) if folder.startswith("elsewhere") else root / folder
    place.mkdir(parents=True)
    for number in range(2):
        path = place / f"{number}.{suffix}"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
        Image.open(path).load()
(root / "fish").symlink_to(Path("elsewhere/fish").resolve(), target_is_directory=True)
rows = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir="cache")
found = len(rows)
assert found == 2, f"changed: {found} rows, {rows.features}"
print("as described: 2 of 8 images are rows")
EOF
if grep -qi "skip\|ignor\|avif\|__dogs\|fish" said.txt; then echo "changed: it is told"; exit 1; fi
