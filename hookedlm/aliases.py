"""Short names of models: TransformerLens' spelling -> where the Hugging Face hub keeps it.

Any hub name works without standing here; the architecture is read from the config. Small and large
letters are one.
"""

from __future__ import annotations

BY_LAST_PART: dict[str, str] = {
    "01-ai": "Yi-6B Yi-6B-Chat Yi-34B Yi-34B-Chat",
    "ai-forever": "mGPT",
    "allenai": "OLMo-1B-hf",
    "bigcode": "santacoder",
    "bigscience": "bloom-560m bloom-1b1 bloom-1b7 bloom-3b bloom-7b1",
    "distilbert": "distilgpt2",
    "EleutherAI": "gpt-j-6B gpt-neo-125M gpt-neo-1.3B gpt-neo-2.7B gpt-neox-20b",
    "facebook": "opt-125m opt-350m opt-1.3b opt-2.7b opt-6.7b opt-13b opt-30b opt-66b",
    "google": "gemma-2b gemma-2b-it gemma-7b gemma-7b-it gemma-2-2b gemma-2-2b-it gemma-2-9b "
    "gemma-2-9b-it gemma-2-27b gemma-2-27b-it gemma-3-270m gemma-3-270m-it gemma-3-1b-pt "
    "gemma-3-1b-it gemma-3-4b-pt gemma-3-4b-it gemma-3-12b-pt gemma-3-12b-it gemma-3-27b-pt "
    "gemma-3-27b-it medgemma-4b-pt medgemma-4b-it medgemma-27b-it medgemma-27b-text-it",
    "google-bert": "bert-base-cased bert-base-uncased bert-large-cased bert-large-uncased",
    "google-t5": "t5-small t5-base t5-large",
    "HuggingFaceTB": "SmolLM2-135M",
    "meta-llama": "Llama-3.2-1B Llama-3.2-3B Llama-3.1-8B",
    "microsoft": "phi-1 phi-1_5 phi-2 phi-4",
    "Qwen": "Qwen-7B Qwen-7B-Chat Qwen-14B Qwen-14B-Chat Qwen1.5-0.5B Qwen1.5-0.5B-Chat "
    "Qwen1.5-1.8B Qwen1.5-1.8B-Chat Qwen1.5-4B Qwen1.5-4B-Chat Qwen1.5-7B Qwen1.5-7B-Chat "
    "Qwen1.5-14B Qwen1.5-14B-Chat Qwen2-0.5B Qwen2-0.5B-Instruct Qwen2-1.5B Qwen2-1.5B-Instruct "
    "Qwen2-7B Qwen2-7B-Instruct Qwen2.5-0.5B Qwen2.5-0.5B-Instruct Qwen2.5-1.5B "
    "Qwen2.5-1.5B-Instruct Qwen2.5-3B Qwen2.5-3B-Instruct Qwen2.5-7B Qwen2.5-7B-Instruct "
    "Qwen2.5-14B Qwen2.5-14B-Instruct Qwen2.5-32B Qwen2.5-32B-Instruct Qwen2.5-72B "
    "Qwen2.5-72B-Instruct Qwen3-0.6B Qwen3-0.6B-Base Qwen3-1.7B Qwen3-4B Qwen3-8B Qwen3-14B",
    "stabilityai": "stable-code-3b stable-code-instruct-3b stablelm-3b-4e1t stablelm-zephyr-3b "
    "stablelm-base-alpha-3b stablelm-base-alpha-7b stablelm-tuned-alpha-3b stablelm-tuned-alpha-7b",
    "ArthurConmy": "redwood_attn_2l",
}
"""Models whose short name is the last part of their hub name."""

OTHERS: dict[str, str] = {
    "Baidicoot/Othello-GPT-Transformer-Lens": "othello-gpt",
    "codellama/CodeLlama-7b-hf": "CodeLlamallama-2-7b",
    "codellama/CodeLlama-7b-Instruct-hf": "CodeLlama-7b-instruct",
    "codellama/CodeLlama-7b-Python-hf": "CodeLlama-7b-python",
    "distilbert/distilgpt2": "distillgpt2 distill-gpt2 distil-gpt2 gpt2-xs",
    "EleutherAI/gpt-j-6B": "gpt-j gptj",
    "EleutherAI/gpt-neo-125M": "gpt-neo-small neo-small neo",
    "EleutherAI/gpt-neo-1.3B": "gpt-neo-medium neo-medium",
    "EleutherAI/gpt-neo-2.7B": "gpt-neo-large neo-large",
    "EleutherAI/gpt-neox-20b": "gpt-neox neox",
    "facebook/opt-125m": "opt-small opt",
    "facebook/opt-1.3b": "opt-medium",
    "facebook/opt-2.7b": "opt-large",
    "facebook/opt-6.7b": "opt-xl",
    "facebook/opt-13b": "opt-xxl",
    "facebook/opt-30b": "opt-xxxl",
    "facebook/opt-66b": "opt-xxxxl",
    "gpt2": "gpt2-small",
    "meta-llama/Llama-2-7b-hf": "Llama-2-7b",
    "meta-llama/Llama-2-7b-chat-hf": "Llama-2-7b-chat",
    "meta-llama/Llama-2-13b-hf": "Llama-2-13b",
    "meta-llama/Llama-2-13b-chat-hf": "Llama-2-13b-chat",
    "meta-llama/Llama-2-70b-chat-hf": "Llama-2-70b-chat meta-llama-2-70b-chat-hf",
    "microsoft/Phi-3-mini-4k-instruct": "phi-3",
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistral-7b-instruct",
    "mistralai/Mistral-Nemo-Base-2407": "mistral-nemo-base-2407",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral mixtral-8x7b",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-instruct mixtral-8x7b-instruct",
    "NeelNanda/Attn-Only-2L512W-Shortformer-6B-big-lr": "attn-only-2l-demo attn-only-demo "
    "attn-only-2l-shortformer-6b-big-lr attn-only-2l-induction-demo",
    "NeelNanda/SoLU_1L512W_Wiki_Finetune": "solu-1l-wiki solu-1l-wiki-finetune solu-1l-finetune",
    "NeelNanda/SoLU_4L512W_Wiki_Finetune": "solu-4l-wiki solu-4l-wiki-finetune solu-4l-finetune",
    "Qwen/Qwen-1_8B": "qwen-1.8b",
    "Qwen/Qwen-1_8B-Chat": "qwen-1.8b-chat",
    "Qwen/QwQ-32B-Preview": "qwen-32b-preview",
    "roneneldan/TinyStories-1Layer-21M": "tiny-stories-1L-21M",
    "roneneldan/TinyStories-2Layers-33M": "tiny-stories-2L-33M",
    "roneneldan/TinyStories-Instruct-2Layers-33M": "tiny-stories-instruct-2L-33M",
    "roneneldan/TinyStories-Instuct-1Layer-21M": "tiny-stories-instruct-1L-21M",
    "stabilityai/stablelm-3b-4e1t": "stablelm-3b",
    "stabilityai/stablelm-2-1_6b": "stablelm-2-1.6b",
    "stabilityai/stablelm-2-zephyr-1_6b": "stablelm-2-zephyr-1.6b",
    **{
        f"stabilityai/stablelm-{kind}-alpha-{size}": f"stablelm-{kind}-{size}"
        for kind in ("base", "tuned")
        for size in ("3b", "7b")
    },
    **{
        f"deepseek-ai/DeepSeek-R1-Distill-{kind}": f"deepseek-r1-distill-{kind} "
        f"deepseek-r1-distill-{kind}-chat"
        for kind in ("Llama-8B", "Llama-70B", "Qwen-1.5B", "Qwen-7B", "Qwen-14B", "Qwen-32B")
    },
    **{
        f"roneneldan/TinyStories-{kind}{size}": f"tiny-stories-{kind}{size}"
        for kind in ("", "Instruct-")
        for size in ("1M", "3M", "8M", "28M", "33M")
    },
    **{
        f"NeelNanda/{kind}_{size}_C4_Code": f"{short} {short}-new {short}-c4-code"
        for kind, sizes in (
            ("Attn_Only", "1L512W 2L512W 3L512W 4L512W"),
            ("GELU", "1L512W 2L512W 3L512W 4L512W"),
            ("SoLU", "1L512W 2L512W 3L512W 4L512W 6L768W 8L1024W 10L1280W 12L1536W"),
        )
        for size in sizes.split()
        for short in [f"{kind.replace('_', '-')}-{size.split('L')[0]}l".lower()]
    },
    **{
        f"NeelNanda/SoLU_{n}L_v{version}_old": f"solu-{n}l-pile solu-{n}l-old"
        for n, version in ((1, 9), (2, 10), (4, 11), (6, 13), (8, 21), (10, 22), (12, 23))
    },
    **{
        f"stanford-crfm/{name}": f"{name} stanford-gpt2-{size}-{letter} "
        f"gpt2-stanford-{size}-{letter} "
        f"gpt2-{'mistral' if size == 'small' else 'medium'}-small-{letter}"
        for size, names in (
            ("small", "alias battlestar caprica darkmatter expanse"),
            ("medium", "arwen beren celebrimbor durin eowyn"),
        )
        for letter, seed, first in zip("abcde", (21, 49, 81, 343, 777), names.split(), strict=True)
        for name in [f"{first}-gpt2-{size}-x{seed}"]
    },
}
"""Hub name -> its other short names."""

PYTHIA_ONCE = {
    "70m": "19m",
    "160m": "125m",
    "410m": "350m",
    "1b": "800m",
    "1.4b": "1.3b",
    "2.8b": "2.7b",
    "6.9b": "6.7b",
    "12b": "13b",
}
"""The sizes of Pythia, and what they were called before their parameters were counted anew."""


def _aliases() -> dict[str, str]:
    aliases = {
        name.lower(): f"{owner}/{name}"
        for owner, names in BY_LAST_PART.items()
        for name in names.split()
    }
    aliases |= {short.lower(): name for name, shorts in OTHERS.items() for short in shorts.split()}
    for size in ("14m", "31m", *PYTHIA_ONCE):
        for suffix in ("", "-deduped", "-v0", "-deduped-v0"):
            name = f"EleutherAI/pythia-{size}{suffix}"
            aliases[f"pythia-{size}{suffix}"] = name
            if once := PYTHIA_ONCE.get(size):
                aliases[f"pythia-{once}{suffix}"] = name
                aliases[f"eleutherai/pythia-{once}{suffix}"] = name
    for seed in (1, 2, 3):
        aliases[f"pythia-160m-seed{seed}"] = f"EleutherAI/pythia-160m-seed{seed}"
    return aliases | {"pythia": "EleutherAI/pythia-70m", "olmo-1b": "allenai/OLMo-1B-hf"}


ALIASES: dict[str, str] = _aliases()
"""Short name, in small letters -> hub name."""


def official_name(name: str) -> str:
    """Where a name leads: a short one to its place on the hub, any other to itself."""
    return ALIASES.get(name.lower(), name)
