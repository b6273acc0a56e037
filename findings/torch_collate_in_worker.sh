#!/usr/bin/env bash
# torch 2.13.0: the numbers in a batch depend on whether a worker made it, where its rows differ in type.
#
# default_collate stacks rows of several types into the type that holds all of them, but in a worker of a DataLoader into the type of
# the first row, since it makes the memory for the batch from that row. So 300 beside a uint8 is 44, 2**40 beside an int32 is 0, a
# float64 beside a float32 loses half its digits, all without a word, and only with num_workers above 0; a whole number before a
# fraction ends in a TypeError there and is a fraction without workers. Which rows lose depends on which comes first, so on the order
# of the epoch.
set -euo pipefail
trap 'echo "changed at line $LINENO"' ERR
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > collate.py <<'EOS'
import torch
from torch.utils.data import DataLoader


def batch(rows: list[torch.Tensor], num_workers: int) -> torch.Tensor:
    return next(iter(DataLoader(rows, batch_size=len(rows), num_workers=num_workers)))


def main() -> None:
    for first, second, alone, in_worker in (
        (torch.tensor([1], dtype=torch.uint8), torch.tensor([300]), 300, 44),
        (torch.tensor([1], dtype=torch.int32), torch.tensor([2**40]), 2**40, 0),
        (torch.tensor([1.0]), torch.tensor([0.1], dtype=torch.float64), 0.1, 0.10000000149011612),
    ):
        found = [batch([first, second], num_workers)[1].item() for num_workers in (0, 1)]
        print(f"{second.item()!r} beside a {first.dtype}: {found[0]!r} without workers, {found[1]!r} with one")
        assert found == [alone, in_worker], f"changed: {found}"
        turned = [batch([second, first], num_workers)[0].item() for num_workers in (0, 1)]
        assert turned == [alone, alone], f"changed: {turned}, where the wider type comes first"
    rows = [torch.tensor([1]), torch.tensor([2.5])]
    assert batch(rows, 0).tolist() == [[1.0], [2.5]], "changed"
    try:
        batch(rows, 1)
    except TypeError:
        print("as described: in a worker all rows get the type of the first")
    else:
        raise AssertionError("changed: a fraction after a whole number is no error in a worker")


if __name__ == "__main__":
    main()
EOS
env/bin/python collate.py 2> errors.txt || { tail -3 errors.txt; exit 1; }
