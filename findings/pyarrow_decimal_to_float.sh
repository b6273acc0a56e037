#!/usr/bin/env bash
# pyarrow 26.0.1: casting decimals to float64 does not give the nearest float.
#
# float(Decimal('0.35')) and a cast by way of text give 0.35, the cast of decimal128 gives 0.35000000000000003. Of the 999
# hundredths from 0.01 to 9.99 a hundred and more are off by one unit in the last place. So the same prices differ between a
# parquet file with decimals and one with floats.
set -euo pipefail
trap 'echo "changed at line $LINENO"' ERR
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet pyarrow==26.0.1
env/bin/python - <<'EOF'
from decimal import Decimal

import pyarrow as pa

values = [Decimal(hundredths) / 100 for hundredths in range(1, 1000)]
column = pa.array(values, pa.decimal128(10, 2))
direct = column.cast(pa.float64()).to_pylist()
by_text = column.cast(pa.string()).cast(pa.float64()).to_pylist()
assert by_text == [float(value) for value in values]
wrong = sum(found != float(value) for found, value in zip(direct, values, strict=True))
assert wrong > 100, f"changed: {wrong} of {len(values)} differ"
assert direct[34] == 0.35000000000000003, f"changed: {direct[34]!r}"
print(f"as described: {wrong} of {len(values)} decimals are cast to another float than the nearest")
EOF
