#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: LoRA on Mixtral's experts warns that a rank was ignored which it has applied.
#
# target_modules w1, w2, w3 are converted to the fused experts of transformers 5, the two that are one tensor with twice the
# rank. get_peft_model then warns that the keys of rank_pattern and alpha_pattern for gate_up_proj "did not match any targeted
# module and were ignored". They were not: with 4 experts and r=4 the matrix of gate_up_proj has 4 x 8 rows, that of down_proj
# 4 x 4.
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
from transformers import MixtralConfig, MixtralForCausalLM

size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
model = MixtralForCausalLM(MixtralConfig(vocab_size=50, num_local_experts=4, max_position_embeddings=32, **size))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["w1", "w2", "w3"]))
words = [str(each.message) for each in said if "rank_pattern" in str(each.message)]
rows = sorted(len(weight) for name, weight in adapted.named_parameters() if "lora_A" in name)
assert len(words) == 1, f"changed: {words}"
assert "gate_up_proj" in words[0] and "were ignored" in words[0], f"changed: {words}"
assert rows == [4 * 4, 4 * 8], f"changed: {rows}"
print("as described: the rank of gate_up_proj is said to be ignored, and is applied")
EOF
