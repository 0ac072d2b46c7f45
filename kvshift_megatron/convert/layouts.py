"""Names of Hugging Face's layouts, in a module without torch so that `--help` stays fast."""

LAYOUTS = ("kvshift", "baichuan_m1", "llama", "mistral", "qwen2", "qwen3", "mixtral")
LAYOUTS_WITH_TAPS = LAYOUTS[:2]
