// What a node of llama.cpp's graph is to edgemoe, told by its name (llama-graph.cpp, build_moe_ffn).
#pragma once

#include <cstring>
#include <utility>

namespace edgemoe {

enum class NodeKind {
    other,
    residual,       // ffn_inp: the residual stream before the layer's experts
    logits,         // ffn_moe_logits: what the router says, [n_expert, n_tokens]
    biased_logits,  // ffn_moe_logits_biased: with the router's own bias
    probs,          // ffn_moe_probs: softmax or sigmoid of them; where neither is taken (gpt-oss), the biased logits
    biased_probs,   // ffn_moe_probs_biased: with the bias that counts for selection only
    top_k,          // ffn_moe_topk: the selected ids, [n_expert_used, n_tokens]
    outputs,   // ffn_moe_down: what they answer, [n_embd, n_expert_used, n_tokens]; scaled, biased where so trained
    weighted,  // ffn_moe_weighted: the outputs times the weights; where weights come first (llama4), the inputs
};

struct Node {
    NodeKind kind = NodeKind::other;
    int layer = -1;
};

// Exactly `<name>-<layer>`: a cast of ffn_moe_topk-3 is named `ffn_moe_topk-3 (copy)`.
inline Node node_named(const char* name) {
    static constexpr std::pair<const char*, NodeKind> kNames[] = {
        {"ffn_inp-", NodeKind::residual},
        {"ffn_moe_logits-", NodeKind::logits},
        {"ffn_moe_logits_biased-", NodeKind::biased_logits},
        {"ffn_moe_probs-", NodeKind::probs},
        {"ffn_moe_probs_biased-", NodeKind::biased_probs},
        {"ffn_moe_topk-", NodeKind::top_k},
        {"ffn_moe_down-", NodeKind::outputs},
        {"ffn_moe_down_scaled-", NodeKind::outputs},
        {"ffn_moe_down_biased-", NodeKind::outputs},
        {"ffn_moe_weighted-", NodeKind::weighted},
    };
    if (std::strncmp(name, "ffn_", 4) != 0) {
        return {};
    }
    for (const auto& [prefix, kind] : kNames) {
        const size_t n = std::strlen(prefix);
        if (std::strncmp(name, prefix, n) != 0) {
            continue;
        }
        int layer = 0;
        const char* digit = name + n;
        for (; *digit >= '0' && *digit <= '9' && layer <= 100000; ++digit) {
            layer = layer * 10 + (*digit - '0');
        }
        if (*digit == '\0' && digit != name + n) {
            return {kind, layer};
        }
    }
    return {};
}

}  // namespace edgemoe
