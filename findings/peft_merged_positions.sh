#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: LoRA on the learned positions of OPT is not what merge_and_unload makes of it.
#
# OPT's position layer is called with the attention mask and works out the positions itself. peft's embedding layer takes the
# first argument, a mask of ones, for the ids to look its own vectors up by: while training, every token gets the addition of
# position 1, and the merged weights give each position its own. Nothing is said. Seen: the logits before and after merging
# differ by more than a tenth of the largest; for q_proj they agree to 1e-6.
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
import peft
import torch
from transformers import OPTConfig, OPTForSequenceClassification

torch.manual_seed(0)
size = dict(hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
config = OPTConfig(vocab_size=50, max_position_embeddings=32, pad_token_id=1, num_labels=2, **size)
ids = torch.randint(5, 50, (2, 8))


def difference(target: str) -> float:
    model = peft.get_peft_model(OPTForSequenceClassification(config), peft.LoraConfig(r=4, target_modules=[target])).eval()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = model(**inputs).logits
    after = model.merge_and_unload()(**inputs).logits
    return ((before - after).abs().max() / before.abs().max()).item()


assert difference("q_proj") < 1e-5
found = difference("embed_positions")
assert found > 0.1, f"changed: {found}"
print(f"as described: merging changes the logits of OPT with LoRA on its positions by {found:.2f} of the largest")
EOF
