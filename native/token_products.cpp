#include "token_products.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "numbers.h"

namespace edgemoe {

namespace {

constexpr int64_t kRows = 64;            // that a thread takes at once, as MUL_MAT_ID does
constexpr size_t kRowBytes = 64 * 1024;  // of an input in the kernel's own type, on the thread's stack

int64_t n_chunks(int64_t n_rows) { return (n_rows + kRows - 1) / kRows; }

}  // namespace

void TokenProducts::pass(ggml::Tensor* node) {
    passed_before_ = std::exchange(passed_, node);
    if (node->op != api_.op_custom) {
        return;
    }
    ggml::CustomOp op{};
    std::memcpy(&op, node->op_params, sizeof(op));
    if (op.fun == compute || op.fun == computed_before) {
        const auto& its = op_params_.at(node);
        std::copy(its.begin(), its.end(), node->op_params);
        node->op = api_.op_mul_mat_id;
    }
}

bool TokenProducts::suit(const ggml::Tensor* node) const {
    const int type = input_type(node);
    return node->src[2]->ne[1] == 1 &&
           (node->src[1]->type == type || api_.row_size(type, node->src[1]->ne[0]) <= kRowBytes);
}

// Both have the same inputs, and nothing comes between: the second's result lies where nothing is that the first needs.
bool TokenProducts::joins(const ggml::Tensor* node) const {
    if (latest_ == nullptr || latest_->parts.empty() || latest_->parts.back().node != passed_before_) {
        return false;
    }
    return passed_before_->src[1] == node->src[1] && passed_before_->src[2] == node->src[2] &&
           input_type(passed_before_) == input_type(node);
}

void TokenProducts::put_in(int id, std::function<void()> meanwhile) {
    ggml::Tensor* node = passed_;
    const bool joined = meanwhile == nullptr && joins(node);
    if (!joined) {
        const int type = input_type(node);
        latest_ = &products_[node];
        latest_->store = &store_;
        latest_->input = node->src[1];
        latest_->from_float = node->src[1]->type == type ? nullptr : api_.type_traits(type)->from_float;
        latest_->parts.clear();
        latest_->terms.clear();
        latest_->meanwhile = std::move(meanwhile);
        latest_->next_chunk.store(0, std::memory_order_relaxed);
    }
    std::vector<Term>& terms = latest_->terms;
    read_numbers(node->src[2], selected_);
    for (size_t column = 0; column < selected_.size(); ++column) {
        const int32_t expert = selected_[column];
        terms.push_back({latest_->parts.size(), expert, store_.address(id, expert), static_cast<int64_t>(column)});
    }
    latest_->parts.push_back({node, id, api_.type_traits(node->src[0]->type)->vec_dot});
    std::stable_partition(terms.begin(), terms.end(), [this](const Term& term) {
        return !store_.arriving(latest_->parts[term.part].id, term.expert);
    });
    std::copy(std::begin(node->op_params), std::end(node->op_params), op_params_[node].begin());
    const ggml::CustomOp op{joined ? computed_before : compute, ggml::kAllThreads, latest_};
    std::memcpy(node->op_params, &op, sizeof(op));
    node->op = api_.op_custom;
}

void TokenProducts::computed_before(ggml::Tensor*, int, int, void*) {}

// Threads take chunks of rows in turns, of one expert after the other. Each converts the input for itself, which takes
// less than a barrier.
void TokenProducts::compute(ggml::Tensor*, int thread, int, void* self) {
    auto& product = *static_cast<Product*>(self);
    if (thread == 0 && product.meanwhile != nullptr) {
        product.meanwhile();
    }
    const ggml::Tensor& input = *product.input;
    alignas(64) std::byte converted[kRowBytes];
    const void* row_of_input = nullptr;
    int64_t chunk = product.next_chunk.fetch_add(1, std::memory_order_relaxed);
    int64_t begin = 0;  // of the term's chunks
    for (const Term& term : product.terms) {
        const auto& [node, id, vec_dot] = product.parts[term.part];
        const ggml::Tensor& experts = *node->src[0];
        const int64_t n_rows = experts.ne[1];
        const int64_t end = begin + n_chunks(n_rows);
        if (chunk >= end) {
            begin = end;
            continue;
        }
        const bool there = product.store->await(id, term.expert, thread == 0);
        const void* raw =
            static_cast<const std::byte*>(input.data) + static_cast<size_t>(term.column % input.ne[1]) * input.nb[1];
        if (product.from_float == nullptr) {
            row_of_input = raw;
        } else if (row_of_input == nullptr || input.ne[1] > 1) {
            product.from_float(static_cast<const float*>(raw), converted, input.ne[0]);
            row_of_input = converted;
        }
        auto* result = reinterpret_cast<float*>(static_cast<std::byte*>(node->data) +
                                                static_cast<size_t>(term.column) * node->nb[1]);
        for (; chunk < end; chunk = product.next_chunk.fetch_add(1, std::memory_order_relaxed)) {
            const int64_t first = (chunk - begin) * kRows;
            const int64_t last = std::min(first + kRows, n_rows);
            if (!there) {  // as `wait` will say; until then nobody computes with what lies there
                std::fill(result + first, result + last, 0.0F);
                continue;
            }
            for (int64_t row = first; row < last; ++row) {
                vec_dot(static_cast<int>(experts.ne[0]), result + row, 0,
                        term.weights + static_cast<size_t>(row) * experts.nb[1], 0, row_of_input, 0, 1);
            }
        }
        begin = end;
    }
}

}  // namespace edgemoe
