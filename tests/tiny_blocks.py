"""The parts that MoE models are made of: tensors of attention, feed-forward and state-space blocks.

Names are those of llama.cpp (`llama-arch.cpp`), without the `blk.<i>.` prefix. Shapes are in ggml order
(`ne[0]` first) and written with the names of dimensions, so that `embd` or `ff_exp` can be changed for a
whole model at once.
"""

from __future__ import annotations

Axis = str  # an int, a dimension's name, or sums of products of these: "2*embd", "lora_kv+rot"
Tensors = dict[str, tuple[Axis, ...]]


def tensors(table: str) -> Tensors:
    """Read a table of one tensor per line: its name, then its axes."""
    rows = (line.split() for line in table.strip().splitlines())
    return {name: tuple(axes) for name, *axes in rows}


OUTPUT = tensors("""
    token_embd.weight   embd vocab
    output_norm.weight  embd
    output.weight       embd vocab
""")
TIED_OUTPUT = {name: axes for name, axes in OUTPUT.items() if name != "output.weight"}

ATTENTION: dict[str, Tensors] = {
    "attn-norm": tensors("attn_norm.weight embd"),
    "ffn-norm": tensors("ffn_norm.weight embd"),
    "norm-biases": tensors("""
        attn_norm.bias  embd
        ffn_norm.bias   embd
    """),
    "post-attn-norm": tensors("post_attention_norm.weight embd"),
    "post-ffn-norm": tensors("post_ffw_norm.weight embd"),
    "attn-out-norm": tensors("attn_output_norm.weight embd"),
    "qkv": tensors("""
        attn_q.weight       embd q
        attn_k.weight       embd kv
        attn_v.weight       embd kv
        attn_output.weight  q embd
    """),
    "qkv-bias": tensors("""
        attn_q.bias  q
        attn_k.bias  kv
        attn_v.bias  kv
    """),
    "attn-out-bias": tensors("attn_output.bias embd"),
    "fused-qkv": tensors("""
        attn_qkv.weight     embd q+2*kv
        attn_output.weight  q embd
    """),
    # Half of this query projection is a gate on the attention's output.
    "gated-qkv": tensors("""
        attn_q.weight       embd 2*q
        attn_k.weight       embd kv
        attn_v.weight       embd kv
        attn_output.weight  q embd
    """),
    "gate-per-head": tensors("attn_gate.weight embd head"),
    "gate-per-element": tensors("attn_gate.weight embd q"),
    "norm-per-head": tensors("""
        attn_q_norm.weight  head_dim
        attn_k_norm.weight  head_dim
    """),
    "norm-of-all-heads": tensors("""
        attn_q_norm.weight  q
        attn_k_norm.weight  kv
    """),
    "sinks": tensors("attn_sinks.weight head"),
    "mla-query": tensors("""
        attn_q_a.weight       embd lora_q
        attn_q_a_norm.weight  lora_q
        attn_q_b.weight       lora_q head*key_mla
    """),
    "mla-plain-query": tensors("attn_q.weight embd head*key_mla"),
    "mla": tensors("""
        attn_kv_a_mqa.weight   embd lora_kv+rot
        attn_kv_a_norm.weight  lora_kv
        attn_k_b.weight        nope lora_kv head
        attn_v_b.weight        lora_kv value_mla head
        attn_output.weight     head*value_mla embd
    """),
    "indexer": tensors("""
        indexer.k_norm.weight    index
        indexer.k_norm.bias      index
        indexer.proj.weight      embd head_index
        indexer.attn_k.weight    embd index
        indexer.attn_q_b.weight  lora_q head_index*index
    """),
    # DeepSeek V4: one latent is key and value, the output projection goes through groups.
    "grouped-mla": tensors("""
        attn_q_a.weight       embd lora_q
        attn_q_a_norm.weight  lora_q
        attn_q_b.weight       lora_q q
        attn_kv.weight        embd head_dim
        attn_kv_a_norm.weight head_dim
        attn_output_a.weight  q_group lora_out group_out
        attn_output_b.weight  group_out*lora_out embd
    """),
    "compressed-by-4": tensors("""
        attn_compressor_kv.weight       embd 2*head_dim
        attn_compressor_gate.weight     embd 2*head_dim
        attn_compressor_ape.weight      2*head_dim 4
        attn_compressor_norm.weight     head_dim
        indexer.proj.weight             embd head_index
        indexer.attn_q_b.weight         lora_q head_index*index
        indexer_compressor_kv.weight    embd 2*index
        indexer_compressor_gate.weight  embd 2*index
        indexer_compressor_ape.weight   2*index 4
        indexer_compressor_norm.weight  index
    """),
    "compressed-by-128": tensors("""
        attn_compressor_kv.weight    embd head_dim
        attn_compressor_gate.weight  embd head_dim
        attn_compressor_ape.weight   head_dim 128
        attn_compressor_norm.weight  head_dim
    """),
    "hyper-connections": tensors("""
        hc_attn_fn.weight     hyper*embd hyper_mix
        hc_attn_base.weight   hyper_mix
        hc_attn_scale.weight  3
        hc_ffn_fn.weight      hyper*embd hyper_mix
        hc_ffn_base.weight    hyper_mix
        hc_ffn_scale.weight   3
    """),
}

FEED_FORWARD: dict[str, Tensors] = {
    "dense": tensors("""
        ffn_gate.weight  embd ff
        ffn_up.weight    embd ff
        ffn_down.weight  ff embd
    """),
    "experts": tensors("""
        ffn_gate_inp.weight   embd expert
        ffn_gate_exps.weight  embd ff_exp expert
        ffn_up_exps.weight    embd ff_exp expert
        ffn_down_exps.weight  ff_exp embd expert
    """),
    "merged-experts": tensors("""
        ffn_gate_inp.weight      embd expert
        ffn_gate_up_exps.weight  embd 2*ff_exp expert
        ffn_down_exps.weight     ff_exp embd expert
    """),
    # Nemotron's experts have no gate and work in a space narrower than the residual stream.
    "latent-experts": tensors("""
        ffn_gate_inp.weight     embd expert
        ffn_latent_down.weight  embd latent
        ffn_latent_up.weight    latent embd
        ffn_up_exps.weight      latent ff_exp expert
        ffn_down_exps.weight    ff_exp latent expert
        ffn_up_shexp.weight     embd ff_shexp
        ffn_down_shexp.weight   ff_shexp embd
    """),
    "of-half-width": tensors("""
        ffn_up_exps.weight    latent ff_half expert
        ffn_down_exps.weight  ff_half latent expert
    """),
    "chunk-experts": tensors("""
        ffn_gate_chexps.weight  embd ff_chunk chunk
        ffn_up_chexps.weight    embd ff_chunk chunk
        ffn_down_chexps.weight  ff_chunk embd chunk
    """),
    "expert-biases": tensors("""
        ffn_gate_inp.bias   expert
        ffn_gate_exps.bias  ff_exp expert
        ffn_up_exps.bias    ff_exp expert
        ffn_down_exps.bias  embd expert
    """),
    "selection-bias": tensors("exp_probs_b.bias expert"),
    "selection-bias-without-suffix": tensors("exp_probs_b expert"),
    "selection-by-token": tensors("ffn_gate_tid2eid.weight used vocab"),
    "norm-of-experts": tensors("ffn_norm_exps.weight embd"),
    "norms-of-both-paths": tensors("""
        ffn_gate_inp.scale         embd
        pre_ffw_norm_2.weight      embd
        post_ffw_norm_1.weight     embd
        post_ffw_norm_2.weight     embd
        layer_output_scale.weight  1
    """),
    "shared": tensors("""
        ffn_gate_shexp.weight  embd ff_shexp
        ffn_up_shexp.weight    embd ff_shexp
        ffn_down_shexp.weight  ff_shexp embd
    """),
    "merged-shared": tensors("""
        ffn_up_shexp.weight    embd 2*ff_shexp
        ffn_down_shexp.weight  ff_shexp embd
    """),
    "shared-gate": tensors("ffn_gate_inp_shexp.weight embd"),
    # Next-token prediction: trailing blocks that llama.cpp knows but does not load.
    "nextn": tensors("""
        nextn.eh_proj.weight           2*embd embd
        nextn.enorm.weight             embd
        nextn.hnorm.weight             embd
        nextn.shared_head_norm.weight  embd
    """),
}

RECURRENT: dict[str, Tensors] = {
    "mamba1": tensors("""
        ssm_in.weight       embd 2*inner
        ssm_conv1d.weight   conv inner
        ssm_conv1d.bias     inner
        ssm_x.weight        inner dt+2*state
        ssm_dt_norm.weight  dt
        ssm_dt.weight       dt inner
        ssm_dt.bias         inner
        ssm_b_norm.weight   state
        ssm_c_norm.weight   state
        ssm_a               state inner
        ssm_d               inner
        ssm_out.weight      inner embd
    """),
    "mamba2": tensors("""
        ssm_in.weight      embd 2*inner+2*group*state+dt
        ssm_conv1d.weight  conv inner+2*group*state
        ssm_conv1d.bias    inner+2*group*state
        ssm_dt.bias        dt
        ssm_a              1 dt
        ssm_d              1 dt
        ssm_norm.weight    group_width group
        ssm_out.weight     inner embd
    """),
    "delta-net": tensors("""
        attn_qkv.weight    embd 2*group*state+inner
        attn_gate.weight   embd inner
        ssm_conv1d.weight  conv 2*group*state+inner
        ssm_dt.bias        dt
        ssm_a              dt
        ssm_norm.weight    state
        ssm_out.weight     inner embd
    """),
    "alpha-and-beta": tensors("""
        ssm_alpha.weight  embd dt
        ssm_beta.weight   embd dt
    """),
    "merged-alpha-and-beta": tensors("ssm_ba.weight embd 2*dt"),
    "kimi-delta": tensors("""
        attn_q.weight        embd q
        attn_k.weight        embd q
        attn_v.weight        embd q
        attn_output.weight   q embd
        ssm_conv1d_q.weight  conv 1 q
        ssm_conv1d_k.weight  conv 1 q
        ssm_conv1d_v.weight  conv 1 q
        ssm_f_a.weight       embd head_dim
        ssm_f_b.weight       head_dim q
        ssm_g_a.weight       embd head_dim
        ssm_g_b.weight       head_dim q
        ssm_beta.weight      embd head
        ssm_a                1 head
        ssm_dt.bias          q
        ssm_norm.weight      head_dim
    """),
    "lightning-attention": tensors("""
        attn_qkv.weight     embd 3*q
        attn_gate.weight    embd q
        attn_norm_2.weight  q
        attn_output.weight  q embd
    """),
    "short-conv": tensors("""
        shortconv.conv.weight      conv embd
        shortconv.in_proj.weight   embd 3*embd
        shortconv.out_proj.weight  embd embd
    """),
}

BLOCKS = ATTENTION | FEED_FORWARD | RECURRENT


def layer(parts: str) -> Tensors:
    """The tensors of a layer, given the names of its parts; a later part overrides shapes of earlier ones."""
    return {name: axes for part in parts.split() for name, axes in BLOCKS[part].items()}
