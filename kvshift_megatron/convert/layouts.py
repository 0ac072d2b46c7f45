"""Names of Hugging Face's layouts. Without torch, which the command line's help need not load."""

LAYOUTS = ("kvshift", "baichuan_m1", "llama", "mistral", "qwen2", "qwen3", "mixtral")
LAYOUTS_WITH_TAPS = LAYOUTS[:2]
