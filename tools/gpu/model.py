"""python model.py DIR [--tiny]: a model in the shape of Qwen2.5-0.5B with random weights, in seconds.

The tokenizer is the small one of tests/tiny.py: most ids that such a model draws stand for no text,
so rewards are 0 and nothing is learnt. What it is for: an engine, FSDP2, sync and the canary at a
real size. Weights are drawn wider than usual (0.05), so that log-probs depend on them and the canary
has something to see.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import tiny  # noqa: E402  first: the guard for the name `kernels`
import torch  # noqa: E402
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

HALF = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
TINY = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

began = time.time()
path = sys.argv[1]
shape = TINY if "--tiny" in sys.argv else HALF
tokenizer = tiny.make_tokenizer()
special = {
    "pad_token_id": tokenizer.pad_token_id,
    "eos_token_id": tokenizer.eos_token_id,
    "bos_token_id": None,
}
config = Qwen2Config(
    **shape,
    **special,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
    initializer_range=0.05,
)
torch.manual_seed(0)
with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
model.generation_config = GenerationConfig(do_sample=True, **special)
model.to("cpu").save_pretrained(path)
tokenizer.save_pretrained(path)
millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
print(f"{path}: {millions:.0f}M parameters in {time.time() - began:.1f} s")
