"""The families of causal models in the sweep: a tiny configuration of each, and what is refused of it and why.

`docs/models.md` is written from this table, and `test_families.py` holds each family to it.
"""

from dataclasses import dataclass, field

PAD, END, VOCABULARY = 0, 1, 64  # more rows than the tokenizer has tokens, as in many real models

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END}
_DEEP = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.15, **_IDS}
_LLAMA = {  # the names of sizes since Llama
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    **_DEEP,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.15, **_IDS}
_HEADS = {"head_dim": 16}  # wider than the hidden size over the heads
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {  # DeepSeek's names
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {  # DeepSeek's attention
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 6, "mamba_chunk_size": 8}


# Parts of the errors by which something of a family is refused
NO_CLASSIFIER = "transformers has no sequence classifier of the family"
INCOMPLETE = "beside its head"
NO_TRUNK = "does not say which of its modules is its trunk"
NO_POSITIONS = "takes no `position_ids`"
PADDING = "does not keep the padding out"
LOOKS_AHEAD = "looks ahead"
OTHER_LOGITS = "makes its logits of the last hidden states in a way that TRL does not know"

REASONS = {
    NO_CLASSIFIER: "transformers has no sequence classifier of this family",
    INCOMPLETE: "its classifier has more weights than a head, which a base model does not bring",
    NO_TRUNK: "its class in transformers does not say which module is its trunk, which TRL needs",
    NO_POSITIONS: "its positions are absolute, and nothing but the columns of a batch sets them",
    PADDING: "in transformers it generates other texts from prompts that are padded on the left",
    LOOKS_AHEAD: "its layers look at the tokens behind, so that a text's probabilities are not those of sampling",
    OTHER_LOGITS: "its output layer transforms the last states before it makes logits, which TRL does not know",
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        kind: Its `model_type` in transformers.
        config: Fields of its tiny configuration.
        note: What is special about it, for the table.
        load: Why it is refused when it is loaded, a key of `REASONS`.
        ppo: Why PPO refuses it, a key of `REASONS`.
        reward: Why the reward stage refuses it, a key of `REASONS`; then PPO takes its reward from elsewhere.
        other_head: Whether its sequence classifier reads something else than the last token with a layer `score`, so
            that a reward model of it is one of its own, no adapter on the policy's base; the sweep leaves it out.
        fast: Whether `make test` tries it.
    """

    kind: str
    config: dict = field(default_factory=dict)
    note: str = ""
    load: str | None = None
    ppo: str | None = None
    reward: str | None = None
    other_head: bool = False
    fast: bool = False


def _llama(kind, note="", /, **fields):
    own = {name: fields.pop(name) for name in ("load", "ppo", "reward", "other_head", "fast") if name in fields}
    return Family(kind, {**_LLAMA, **fields}, note, **own)


FAMILIES = {
    # Llama and its relatives
    "llama": _llama("llama", "heads wider than the hidden size over them", **_HEADS),
    "llama_tied": _llama("llama", "tied embeddings", tie_word_embeddings=True),
    "mistral": _llama("mistral", sliding_window=None),
    "mistral_sliding": _llama("mistral", "sliding window", sliding_window=4),
    "ministral": _llama("ministral", "sliding and full layers", **_SLIDING, **_HEADS),
    "ministral3": _llama("ministral3"),
    "arcee": _llama("arcee"),
    "apertus": _llama("apertus", reward=NO_CLASSIFIER),
    "ernie4_5": _llama("ernie4_5", reward=NO_CLASSIFIER),
    "hunyuan_dense": _llama("hunyuan_v1_dense", **_HEADS),
    "helium": _llama("helium", head_dim=8),
    "diffllama": _llama("diffllama"),
    "bitnet": _llama("bitnet", reward=NO_CLASSIFIER),
    "persimmon": _llama("persimmon"),
    "nemotron": _llama("nemotron"),
    "internlm3": _llama("internlm3", **_HEADS, reward=NO_CLASSIFIER),
    "seed_oss": _llama("seed_oss", **_HEADS),
    "smollm3": _llama("smollm3", "one layer without positions", no_rope_layers=[1, 0]),
    "cwm": _llama("cwm", "sliding and full layers", **_SLIDING, **_HEADS, reward=NO_CLASSIFIER),
    "jais2": _llama("jais2", reward=NO_CLASSIFIER),
    "youtu": _llama("youtu", "latent attention", **_LATENT, reward=NO_CLASSIFIER),
    "minicpm3": _llama("minicpm3", "latent attention", **_LATENT),
    "hyperclovax": _llama(
        "hyperclovax", "multiplied logits", logits_scaling=0.5, attention_multiplier=0.3, reward=NO_CLASSIFIER
    ),
    "nanochat": _llama("nanochat", "soft-capped logits", reward=NO_CLASSIFIER),
    "stablelm": _llama("stablelm"),
    "doge": _llama("doge", "without its router's loss, which fails in transformers", router_aux_loss_coef=0.0),
    "exaone4": _llama("exaone4", "sliding and full layers", **_SLIDING),
    "glm": _llama("glm", **_HEADS),
    "glm4": _llama("glm4", **_HEADS),
    # Qwen
    "qwen2": _llama("qwen2"),
    "qwen2_sliding": _llama(
        "qwen2", "sliding and full layers", use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": _llama("qwen3", **_HEADS),
    "qwen3_5": _llama("qwen3_5_text", "linear attention", **_LINEAR, **_HEADS),
    # Gemma
    "gemma": _llama("gemma", **_HEADS),
    "gemma2": _llama(
        "gemma2",
        "soft-capped logits, sliding layers",
        sliding_window=4,
        query_pre_attn_scalar=16,
        final_logit_softcapping=4.0,
        attn_logit_softcapping=2.5,
        **_HEADS,
    ),
    "gemma3": _llama("gemma3_text", "sliding and full layers", query_pre_attn_scalar=16, **_SLIDING, **_HEADS),
    "gemma3n": _llama(
        "gemma3n_text",
        "several streams, states shared by layers",
        num_hidden_layers=4,
        intermediate_size=[48] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        **_HEADS,
        reward=NO_CLASSIFIER,
    ),
    "gemma4": _llama(
        "gemma4_text",
        "sliding and full layers",
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        global_head_dim=16,
        num_kv_shared_layers=0,
        **_SLIDING,
        **_HEADS,
        reward=NO_CLASSIFIER,
    ),
    "vaultgemma": _llama(
        "vaultgemma", "sliding and full layers", query_pre_attn_scalar=16, **_SLIDING, **_HEADS, reward=NO_CLASSIFIER
    ),
    # Phi
    "phi": _llama("phi", "an output layer with bias"),
    "phi3": _llama("phi3", sliding_window=None),
    "phi3_sliding": _llama("phi3", "sliding window", sliding_window=4),
    "phimoe": _llama("phimoe", "experts, drawn at random in training", num_local_experts=4, fast=True),
    # OLMo, Granite, Cohere
    "olmo": _llama("olmo"),
    "olmo2": _llama("olmo2"),
    "olmo3": _llama("olmo3", "sliding and full layers", **_SLIDING),
    "granite": _llama(
        "granite",
        "divided logits",
        logits_scaling=3.0,
        embedding_multiplier=2.5,
        attention_multiplier=0.4,
        residual_multiplier=0.6,
        reward=NO_CLASSIFIER,
    ),
    "cohere": _llama("cohere", "multiplied logits", logit_scale=0.3, reward=NO_CLASSIFIER),
    "cohere2": _llama(
        "cohere2",
        "multiplied logits, sliding and full layers",
        logit_scale=0.3,
        **_SLIDING,
        **_HEADS,
        reward=NO_CLASSIFIER,
    ),
    "starcoder2": _llama("starcoder2", "sliding window", sliding_window=4),
    # Mixtures of experts
    "mixtral": _llama("mixtral", "experts", **_LOCAL, **_HEADS),
    "qwen2_moe": _llama("qwen2_moe", "experts", shared_expert_intermediate_size=24, **_EXPERTS),
    "qwen3_moe": _llama("qwen3_moe", "experts", **_EXPERTS, **_HEADS),
    "olmoe": _llama("olmoe", "experts", **_EXPERTS, reward=NO_CLASSIFIER),
    "flex_olmo": _llama("flex_olmo", "experts", **_EXPERTS, reward=NO_CLASSIFIER),
    "granitemoe": _llama("granitemoe", "experts, divided logits", logits_scaling=3.0, **_LOCAL, reward=NO_CLASSIFIER),
    "granitemoeshared": _llama(
        "granitemoeshared", "experts", shared_intermediate_size=24, **_LOCAL, reward=NO_CLASSIFIER
    ),
    "gpt_oss": _llama("gpt_oss", "experts, attention sinks, sliding and full layers", **_LOCAL, **_SLIDING, **_HEADS),
    "deepseek_v2": _llama("deepseek_v2", "experts, latent attention", **_ROUTED | _LATENT),
    "deepseek_v3": _llama("deepseek_v3", "experts, latent attention", **_ROUTED | _LATENT),
    "dots1": _llama("dots1", "experts", **_ROUTED, reward=NO_CLASSIFIER),
    "glm4_moe": _llama("glm4_moe", "experts", **_ROUTED, **_HEADS, reward=NO_CLASSIFIER),
    "ernie4_5_moe": _llama(
        "ernie4_5_moe",
        "experts",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=24,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        reward=NO_CLASSIFIER,
    ),
    "hunyuan_moe": _llama("hunyuan_v1_moe", "experts", num_experts=4, moe_topk=2, **_HEADS),
    "minimax_m2": _llama("minimax_m2", "experts", **_LOCAL, **_HEADS, reward=NO_CLASSIFIER),
    "jetmoe": _llama("jetmoe", "experts, in the attention too", kv_channels=8, num_key_value_heads=2, **_LOCAL),
    "llama4": _llama(
        "llama4_text",
        "experts, chunked and full layers",
        intermediate_size_mlp=48,
        interleave_moe_layer_step=1,
        num_local_experts=2,
        attention_chunk_size=8,
        **_HEADS,
        load=NO_TRUNK,
    ),
    "afmoe": _llama(
        "afmoe",
        "experts, sliding and full layers",
        num_dense_layers=1,
        num_shared_experts=1,
        **_EXPERTS,
        **_SLIDING,
        **_HEADS,
        reward=NO_CLASSIFIER,
    ),
    "longcat_flash": _llama(
        "longcat_flash",
        "experts, latent attention",
        num_layers=2,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=24,
        moe_topk=2,
        zero_expert_num=1,
        head_dim=8,
        n_routed_experts=4,
        **_LATENT,
        reward=NO_CLASSIFIER,
    ),
    "dbrx": Family(
        "dbrx",
        {
            **_IDS,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 96,
            "initializer_range": 0.15,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
        "experts, jitter in training",
        reward=NO_CLASSIFIER,
    ),
    # GPT-2 and what followed it
    "gpt2": Family("gpt2", _GPT2, "absolute positions"),
    "gpt_bigcode": Family("gpt_bigcode", _GPT2, "absolute positions"),
    "gptj": Family("gptj", {**_GPT2, "rotary_dim": 4}, "an output layer with bias"),
    "codegen": Family("codegen", {**_GPT2, "rotary_dim": 4}, "an output layer with bias", reward=NO_CLASSIFIER),
    "openai_gpt": Family("openai-gpt", _GPT2, "absolute positions"),
    "ctrl": Family("ctrl", {**_GPT2, "dff": 48}, "absolute positions, an output layer with bias", other_head=True),
    "gpt_neo": Family(
        "gpt_neo",
        {
            **_LLAMA,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        "absolute positions, local and global layers",
    ),
    "gpt_neox": _llama("gpt_neox"),
    "gpt_neox_japanese": _llama("gpt_neox_japanese", intermediate_multiple_size=2, reward=NO_CLASSIFIER),
    "opt": _llama(
        "opt",
        "absolute positions, dropout in its functions",
        ffn_dim=48,
        word_embed_proj_dim=32,
        init_std=0.15,
    ),
    "opt_projected": _llama(
        "opt",
        "absolute positions, dropout in its functions, embeddings narrower than the layers (OPT-350m)",
        fast=True,
        ffn_dim=48,
        word_embed_proj_dim=16,
        init_std=0.15,
        do_layer_norm_before=False,
    ),
    "biogpt": _llama("biogpt", "absolute positions, dropout in its functions"),
    "xglm": _llama(
        "xglm",
        "absolute positions",
        d_model=32,
        ffn_dim=48,
        num_layers=2,
        attention_heads=4,
        init_std=0.15,
        reward=NO_CLASSIFIER,
    ),
    "bloom": Family(
        "bloom",
        {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.15},
        "ALiBi, no limit of the context",
    ),
    "mpt": Family(
        "mpt",
        {**_IDS, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 96, "initializer_range": 0.15},
        "ALiBi",
    ),
    "falcon": _llama("falcon", "rotary", new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "falcon_alibi": _llama("falcon", "ALiBi", new_decoder_architecture=False, alibi=True),
    # State spaces, convolutions, linear attention
    "mamba": Family("mamba", {**_DEEP, "state_size": 6}, "state space", reward=NO_CLASSIFIER),
    "mamba2": Family(
        "mamba2",
        {**_DEEP, "state_size": 6, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
        "state space",
        reward=NO_CLASSIFIER,
    ),
    "falcon_mamba": Family("falcon_mamba", {**_DEEP, "state_size": 6}, "state space", reward=NO_CLASSIFIER),
    "falcon_h1": _llama(
        "falcon_h1",
        "attention beside a state space, scaled logits",
        mamba_d_ssm=64,
        lm_head_multiplier=0.5,
        **_MAMBA2,
        reward=NO_CLASSIFIER,
    ),
    "bamba": _llama("bamba", "state spaces and attention", attn_layer_indices=[1], **_MAMBA2, reward=NO_CLASSIFIER),
    "jamba": _llama(
        "jamba",
        "state spaces, attention, experts",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=6,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "granitemoehybrid": _llama(
        "granitemoehybrid",
        "state spaces, attention, experts",
        layer_types=["mamba", "attention"],
        shared_intermediate_size=24,
        logits_scaling=3.0,
        **_LOCAL,
        **_MAMBA2,
        reward=NO_CLASSIFIER,
    ),
    "nemotron_h": _llama(
        "nemotron_h",
        "state spaces and attention",
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=6,
        chunk_size=8,
        **_HEADS,
        reward=NO_CLASSIFIER,
    ),
    "zamba2": _llama(
        "zamba2",
        "state spaces and shared attention",
        layers_block_type=["mamba", "hybrid"],
        attention_head_dim=16,
        mamba_ngroups=1,
        mamba_d_state=6,
        n_mamba_heads=4,
        chunk_size=8,
        adapter_rank=4,
        num_mem_blocks=1,
        use_mem_rope=True,
    ),
    "recurrent_gemma": _llama(
        "recurrent_gemma",
        "recurrent layers, local attention",
        attention_window_size=8,
        lru_width=32,
        block_types=["recurrent", "attention"],
        num_hidden_layers=2,
        reward=NO_CLASSIFIER,
        ppo=PADDING,
    ),
    "lfm2": _llama("lfm2", "convolutions and attention", layer_types=["conv", "full_attention"], reward=NO_CLASSIFIER),
    "lfm2_moe": _llama(
        "lfm2_moe",
        "convolutions, attention, experts",
        layer_types=["conv", "full_attention"],
        num_dense_layers=1,
        **_EXPERTS,
        reward=NO_CLASSIFIER,
    ),
    "qwen3_next": _llama(
        "qwen3_next", "linear attention, experts", shared_expert_intermediate_size=24, **_EXPERTS, **_LINEAR, **_HEADS
    ),
    "minimax": _llama(
        "minimax",
        "lightning attention, experts",
        fast=True,
        block_size=8,
        layer_types=["linear_attention", "full_attention"],
        **_LOCAL,
        **_HEADS,
        ppo=PADDING,
    ),
    "olmo_hybrid": _llama("olmo_hybrid", "linear attention", **_LINEAR, reward=NO_CLASSIFIER),
    "rwkv": Family(
        "rwkv",
        {**_DEEP, "attention_hidden_size": 32, "context_length": 96},
        "recurrent",
        reward=NO_CLASSIFIER,
        ppo=PADDING,
    ),
    "xlstm": Family(
        "xlstm",
        {
            **_DEEP,
            "hidden_size": 64,
            "embedding_dim": 64,
            "qk_dim_factor": 1.0,
            "num_blocks": 2,
            "num_heads": 4,
            "chunkwise_kernel": "chunkwise--native_autograd",
            "sequence_kernel": "native_sequence__native",
            "step_kernel": "native",
        },
        "recurrent",
        reward=NO_CLASSIFIER,
        ppo=PADDING,
    ),
    # Encoders that can be asked for as causal models
    "bert_decoder": _llama(
        "bert",
        "as a decoder, absolute positions",
        is_decoder=True,
        other_head=True,
        ppo=OTHER_LOGITS,
    ),
    "bert": _llama("bert", "looks ahead", other_head=True, ppo=LOOKS_AHEAD),
    "xlnet": Family(
        "xlnet",
        {**_IDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "looks ahead",
        reward=INCOMPLETE,
        ppo=LOOKS_AHEAD,
    ),
    "modernbert_decoder": _llama(
        "modernbert-decoder",
        "local and global layers",
        local_attention=8,
        cls_token_id=END,
        sep_token_id=END,
        reward=INCOMPLETE,
        ppo=OTHER_LOGITS,
    ),
    "roformer": _llama("roformer", is_decoder=True, load=NO_POSITIONS),
}
