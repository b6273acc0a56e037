#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: LoRA on a layer whose weight the model reads, instead of calling the layer, has no
# effect, and nothing says so.
#
# Mamba multiplies with dt_proj.weight itself. get_peft_model wraps dt_proj all the same and lists its matrices as trainable;
# the logits stay those of the base model to the bit whatever the matrices hold, and no gradient reaches them. Seen with a model
# of one block; the control, in_proj, changes the logits.
set -euo pipefail
trap 'echo "changed at line $LINENO"' ERR
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet torch==2.13.0
env/bin/python -m pip install --quiet peft==0.21.2
env/bin/python -m pip install --quiet transformers==5.23.0
env/bin/python - <<'EOF'
import warnings

import peft
import torch
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
ids = torch.randint(5, 50, (2, 8))


def effect(target: str) -> tuple[bool, bool, list[str]]:
    """Whether the logits change, whether they have a gradient to the additions, and what peft said."""
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1)).eval()
    base = model(input_ids=ids).logits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[target])).eval()
    trainable = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert len(trainable) == 2
    for weight in trainable:
        torch.nn.init.normal_(weight)
    logits = adapted(input_ids=ids).logits
    return not torch.equal(logits, base), logits.requires_grad, [str(each.message) for each in said if target in str(each.message)]


assert effect("in_proj") == (True, True, [])
found = effect("dt_proj")
assert found == (False, False, []), f"changed: {found}"
print("as described: LoRA on Mamba's dt_proj has two trainable matrices, no effect, no gradient and no word")
EOF
