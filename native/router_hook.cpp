#include "router_hook.h"

#include <algorithm>
#include <utility>

#include "numbers.h"

namespace edgemoe {

namespace {

constexpr int64_t kLong = 256;  // tokens

// gpt-oss shows the biased logits as ffn_moe_probs: a sum of the logits, where others take softmax or sigmoid of them.
bool is_biased_logits(const ggml::Tensor* node, Node is) {
    return is.kind == NodeKind::biased_logits ||
           (is.kind == NodeKind::probs && node->src[1] != nullptr && node->src[0] != nullptr &&
            node_named(node->src[0]->name).kind == NodeKind::logits);
}

}  // namespace

bool RouterHook::on_node(ggml::Tensor* node, bool ask, void* self) {
    auto* hook = static_cast<RouterHook*>(self);
    try {
        return ask ? hook->before_node(node) : hook->after_node(node);
    } catch (const std::exception& error) {
        hook->fail(error.what());
        return ask;  // when asked: have this node alone computed, so that the abort is noticed at once
    }
}

bool RouterHook::on_abort(void* self) { return static_cast<RouterHook*>(self)->stop_; }

// True: compute up to and including this node, then call `after_node`.
bool RouterHook::before_node(ggml::Tensor* node) {
    products_.pass(node);
    if (node->op == api_.op_mul_mat_id) {
        const int id = stand_ins_.expert_tensor(node->src[0]);
        if (id >= 0 && before_experts(node, id)) {
            return true;
        }
    }
    read_table(node);
    if (skipping_.awaits(node)) {
        return true;
    }
    const Node is = node_named(node->name);
    if (is.kind == NodeKind::other || store_.n_parts(is.layer) == 0) {
        return false;
    }
    if (skipping_.on() && is.kind == NodeKind::weighted) {
        skipping_.learn(is.layer, node);
    }
    return wants(node, is);
}

// True: have the node that multiplies this part computed at once.
bool RouterHook::before_experts(ggml::Tensor* node, int id) {
    const int layer = store_.tensor(id).layer;
    if (layer == skipping_.postponed_layer()) {
        throw SystemError(Skipping::refusal(layer));
    }
    if (store_.settled(layer)) {
        return false;  // its router was not even asked
    }
    if (layer != served_layer_) {
        throw SystemError("layer " + std::to_string(layer) + " uses experts that its router never announced; " +
                          "this architecture needs a newer edgemoe");
    }
    const uint32_t bit = 1U << store_.part_of(id);
    if (staged_) {
        // Each user of experts is computed at once, so none of those asked about earlier still needs its own.
        store_.acquire(layer, bit, ids_);
        return true;
    }
    std::function<void()> expect = expect_later();
    if (in_parallel() && products_.suit(node)) {
        products_.put_in(id, std::move(expect));
        return false;
    }
    if (expect != nullptr) {
        expect();
    }
    if ((arriving_ & bit) != 0) {
        store_.wait(bit);
        arriving_ &= ~bit;
    }
    stand_ins_.put_in(node, id);
    return arriving_ != 0;  // so that the disk works on the others meanwhile
}

// The tokens are the graph's input: known before any of it is computed.
void RouterHook::read_table(const ggml::Tensor* node) {
    for (const ggml::Tensor* source : {node->src[0], node->src[1]}) {
        const int id = buffer_.table(source);
        if (id < 0) {
            continue;
        }
        const ggml::Tensor* rows = node->src[1];
        if (node->op != api_.op_get_rows || source == rows || rows->op != api_.op_none) {
            throw SystemError(store_.tensor(id).name + " is used for something else than looking up tokens; " +
                              "this architecture needs a newer edgemoe");
        }
        read_numbers(rows, rows_);
        store_.read_rows(id, rows_);
    }
}

bool RouterHook::wants(const ggml::Tensor* node, Node is) const {
    const bool limited = mask_.limits(is.layer);
    switch (is.kind) {
        case NodeKind::residual:
        case NodeKind::weighted:
            return trace_.watches_outputs(is.layer);
        case NodeKind::outputs:
            return trace_.awaits_outputs(is.layer);
        case NodeKind::logits:
            return limited || trace_.watches(is.layer);
        case NodeKind::biased_logits:
        case NodeKind::probs:
            return trace_.watches(is.layer) && is_biased_logits(node, is);
        case NodeKind::biased_probs:
            return limited;
        case NodeKind::top_k:
            if (!limited && !skipping_.on() && !trace_.watches_outputs(is.layer) && is.layer != cut_layer_ &&
                !routes_.forces(is.layer) && store_.settled(is.layer)) {
                count_hits(is.layer, node);
                return false;
            }
            return true;
        default:
            return false;
    }
}

// False: give up on the graph.
bool RouterHook::after_node(ggml::Tensor* node) {
    if (stop_) {
        return false;
    }
    if (skipping_.awaits(node)) {
        const int layer = skipping_.postponed_layer();
        return serve(layer, skipping_.skip(node, ids_));
    }
    const Node is = node_named(node->name);
    if (is.kind == NodeKind::other || store_.n_parts(is.layer) == 0) {
        return true;
    }
    const bool limited = mask_.limits(is.layer);
    switch (is.kind) {
        case NodeKind::residual:
            trace_.add_residual(is.layer, node);
            return true;
        case NodeKind::logits:
            asked_layer_ = is.layer;
            if (trace_.watches(is.layer)) {
                trace_.add_logits(is.layer, node);
            }
            break;
        case NodeKind::biased_logits:
        case NodeKind::probs:
            trace_.add_router_bias(is.layer, node);
            return true;
        case NodeKind::weighted:
            return !trace_.add_weighted(is.layer, node) || is.layer != cut_layer_;
        case NodeKind::outputs:
            if (!trace_.awaits_outputs(is.layer)) {
                return true;  // stopped for its experts only
            }
            trace_.add_outputs(is.layer, node);
            return is.layer != cut_layer_;
        case NodeKind::top_k:
            if (!select(is.layer, node)) {
                return false;
            }
            return (skipping_.on() && skipping_.postpones(is.layer, node, ids_)) || serve(is.layer, node);
        default:
            break;
    }
    if (limited) {
        mask_.exclude(is.layer, node);
    }
    return true;
}

// False: what was asked for is known, no expert is needed any more.
bool RouterHook::select(int layer, ggml::Tensor* top_k) {
    // A router that is used for a second set of experts (grovemoe) selects twice.
    const bool asked = std::exchange(asked_layer_, -1) == layer;
    if (mask_.limits(layer)) {
        if (!asked) {
            ExpertMask::refuse(layer);
        }
        mask_.select_again(layer, top_k);
    }
    if (routes_.forces(layer)) {
        routes_.apply(layer, top_k);
    }
    read_numbers(top_k, ids_);
    if (!trace_.watches_outputs(layer)) {
        return layer != cut_layer_;
    }
    if (asked) {
        trace_.add_ids(layer, ids_, top_k->ne[0]);
    }
    return true;
}

bool RouterHook::serve(int layer, const ggml::Tensor* top_k) {
    finish_waiting();
    served_layer_ = layer;
    batch_memory_.learn(top_k);
    staged_ = false;
    const int n_parts = store_.n_parts(layer);
    if (store_.settled(layer)) {
        count_hits(layer, top_k);
        return true;
    }
    store_.routed(layer, top_k->ne[1], ids_);
    if (skipping_.on()) {
        read_numbers(top_k, ids_);  // a skipped expert was chosen, but is not needed
    }
    look_ahead_.settle(layer, ids_);
    const uint32_t all_parts = (1U << n_parts) - 1;
    staged_ = !store_.fits(layer, all_parts, ids_);
    if (staged_) {
        ++staged_layers_;
        return true;
    }
    store_.request(layer, all_parts, ids_);
    if (store_.tuning().look_ahead) {
        if (store_.all_fit()) {
            complete(layer);
        } else {
            int next = layer;
            for (int ahead = 1; ahead <= look_ahead_.farthest() && (next = store_.layer_after(next)) >= 0; ++ahead) {
                look_ahead(next, ahead, top_k);
            }
        }
    }
    if (store_.tuning().overlap) {
        arriving_ = store_.arriving_parts();
    }
    store_.wait(all_parts & ~arriving_);
    return true;
}

// What was computed with experts that came late, or never, is only now known to be right.
void RouterHook::finish_waiting() {
    if (arriving_ != 0) {
        store_.wait(std::exchange(arriving_, 0));
    }
}

// Where nothing has to be asked for. A request counts distinct experts, of which a batch can have no more than there
// are.
void RouterHook::count_hits(int layer, const ggml::Tensor* top_k) const {
    const int64_t n_experts = std::min<int64_t>(top_k->ne[0] * top_k->ne[1], store_.n_expert(layer));
    store_.count_hits(static_cast<uint64_t>(n_experts * store_.n_parts(layer)));
}

// Where all experts fit and a long batch computes: the disk has time for the rest of the layer, and whatever token
// follows finds it there; in the last layer, too, of which llama.cpp computes one token alone. After fewer tokens
// such reads would cost more than they hide (LOG.md).
void RouterHook::complete(int layer) {
    if (n_tokens_ < kLong || mask_.limits(layer)) {
        return;
    }
    std::vector<int32_t> rest;
    for (int32_t expert = 0; expert < store_.n_expert(layer); ++expert) {
        if (!store_.resident(layer, expert)) {
            rest.push_back(expert);
        }
    }
    store_.expect(layer, rest);
}

void RouterHook::look_ahead(int layer, int ahead, const ggml::Tensor* top_k) {
    // A limited layer's experts are held, and its router is not the one that chooses.
    if (store_.settled(layer) || mask_.limits(layer)) {
        return;
    }
    // llama.cpp computes the last layer for the tokens alone whose logits are wanted: usually the last one.
    const int64_t n_tokens = layer == store_.last_layer() ? 1 : top_k->ne[1];
    const std::vector<int32_t> told = routes_.predicted(layer, ahead, n_tokens);
    if (told.empty() && routes_.predicts()) {
        return;  // random weights have nothing to say
    }
    std::vector<int32_t> experts = look_ahead_.guess(layer, ahead, top_k, n_tokens, told);
    if (in_parallel() && store_.in_slots() && top_k->ne[1] == 1) {
        expectations_.emplace_back(layer, std::move(experts));
    } else {
        store_.expect(layer, experts);
    }
}

// Whether experts are still arriving when llama.cpp's threads begin to multiply.
bool RouterHook::in_parallel() const { return store_.tuning().overlap && store_.n_lanes() > 1; }

// What the calling thread can do while others compute already. In slots alone: elsewhere a failure could take memory
// away from under them.
std::function<void()> RouterHook::expect_later() {
    if (expectations_.empty()) {
        return nullptr;
    }
    return [this, expectations = std::exchange(expectations_, {})] {
        try {
            for (const auto& [layer, experts] : expectations) {
                store_.expect(layer, experts);
            }
        } catch (const std::exception& error) {
            fail(error.what());
        }
    };
}

void RouterHook::watch(const std::vector<int>& layers, bool outputs) {
    for (const int layer : layers) {
        static_cast<void>(store_.n_expert(layer));  // throws
    }
    trace_.watch(layers, outputs);
}

void RouterHook::begin(int64_t position, int64_t n_tokens) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        failure_.clear();
    }
    n_tokens_ = n_tokens;
    const BatchMemory last = std::exchange(batch_memory_, {});
    stop_ = false;
    staged_ = false;
    arriving_ = 0;
    served_layer_ = -1;
    expectations_.clear();
    if (n_tokens != 1) {
        store_.repay();
    } else if (lent_bytes_ > 0 && store_.in_slots() && !store_.borrowing() && last.give_back(lent_bytes_)) {
        store_.borrow();
    }
    look_ahead_.begin(n_tokens);
    skipping_.begin(position, n_tokens);
}

void RouterHook::interrupt() { stop_ = true; }

void RouterHook::fail(const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (failure_.empty()) {
        failure_ = what;
    }
    stop_ = true;
}

std::string RouterHook::take_failure() {
    // A resident model is computed without a single acquire, and its mapped pages can still be lost.
    try {
        if (!stop_) {
            finish_waiting();
        }
        store_.check_mapping();
    } catch (const SystemError& error) {
        fail(error.what());
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(failure_, {});
}

}  // namespace edgemoe
