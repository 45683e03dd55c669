#include "forced_routes.h"

#include <random>

#include "check.h"
#include "fake_ggml.h"

using edgemoe::ForcedRoutes;
using edgemoe::RouteForcer;
using edgemoe::ggml::Tensor;

namespace {

using Ids = std::vector<int32_t>;

constexpr int64_t kExperts = 8, kUsed = 2;
constexpr int32_t kNobody = -5;

// The ids that a router selected for a batch: a view of the first few of each row of a ranking.
struct Selected {
    Selected(int layer, int64_t n_tokens, int64_t n_used = kUsed)
        : ranking(static_cast<size_t>(n_tokens * kExperts), kNobody),
          top_k(fake_ggml::make_tensor(fake_ggml::kI32, "ffn_moe_topk-" + std::to_string(layer), {n_used, n_tokens})) {
        top_k.nb[1] = kExperts * sizeof(int32_t);
        top_k.data = ranking.data();
    }
    Ids row(int64_t token, int64_t n = kUsed) const {
        const auto first = ranking.begin() + token * kExperts;
        return {first, first + n};
    }
    bool rest_untouched() const {
        for (size_t i = 0; i < ranking.size(); ++i) {
            if (static_cast<int64_t>(i) % kExperts >= kUsed && ranking[i] != kNobody) {
                return false;
            }
        }
        return true;
    }
    Ids ranking;
    Tensor top_k;
};

// Each id tells its token, layer and rank.
int32_t id_of(int64_t token, int column, int64_t rank) {
    return static_cast<int32_t>(token * 100 + column * 10 + rank);
}
Ids routes(int64_t n_tokens, int n_layers, int32_t more = 0) {
    Ids ids;
    for (int64_t token = 0; token < n_tokens; ++token) {
        for (int column = 0; column < n_layers; ++column) {
            for (int64_t rank = 0; rank < kUsed; ++rank) {
                ids.push_back(id_of(token, column, rank) + more);
            }
        }
    }
    return ids;
}
Ids row_of(int64_t token, int column, int32_t more = 0) {
    return {id_of(token, column, 0) + more, id_of(token, column, 1) + more};
}

// What the layers of a batch get, whose tokens in the sequence start at `first`.
void pass(ForcedRoutes& forced, const std::vector<int>& layers, int64_t first, int64_t n_tokens, int64_t n_last) {
    for (size_t column = 0; column < layers.size(); ++column) {
        const int64_t n = column + 1 == layers.size() ? n_last : n_tokens;
        Selected selected(layers[column], n);
        forced.apply(layers[column], &selected.top_k);
        for (int64_t token = 0; token < n; ++token) {
            CHECK(selected.row(token) == row_of(first + n_tokens - n + token, static_cast<int>(column)));
        }
        CHECK(selected.rest_untouched());
    }
}

}  // namespace

TEST(rows_are_used_up_by_prompt_and_decode_alike) {
    ForcedRoutes forced;
    forced.set({0, 2, 3}, routes(12, 3), kUsed);
    for (const int layer : {0, 2, 3}) {
        CHECK(forced.forces(layer));
    }
    CHECK(!forced.forces(1) && !forced.forces(4));
    pass(forced, {0, 2, 3}, 0, 5, 5);
    pass(forced, {0, 2, 3}, 5, 1, 1);
    pass(forced, {0, 2, 3}, 6, 4, 4);
    pass(forced, {0, 2, 3}, 10, 1, 1);
    pass(forced, {0, 2, 3}, 11, 1, 1);
}

TEST(last_layer_of_fewer_tokens_gets_the_last_rows) {
    ForcedRoutes forced;
    forced.set({1, 4}, routes(20, 2), kUsed);
    pass(forced, {1, 4}, 0, 7, 1);
    pass(forced, {1, 4}, 7, 5, 2);
    pass(forced, {1, 4}, 12, 4, 0);  // a part of a prompt of which no logits are wanted
    pass(forced, {1, 4}, 16, 3, 1);
    pass(forced, {1, 4}, 19, 1, 1);
}

TEST(random_batches) {
    std::mt19937 random(1);
    for (int round = 0; round < 50; ++round) {
        std::vector<int> layers;
        for (int layer = 0; layer < 6; ++layer) {
            if (random() % 2 == 0 || layer == 5) {
                layers.push_back(layer);
            }
        }
        const int64_t n_rows = 40;
        ForcedRoutes forced;
        forced.set(layers, routes(n_rows, static_cast<int>(layers.size())), kUsed);
        for (int64_t first = 0; first < n_rows;) {
            const int64_t n = std::min<int64_t>(n_rows - first, 1 + static_cast<int64_t>(random() % 9));
            const bool alone = layers.size() == 1;
            pass(forced, layers, first, n, alone ? n : 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(n)));
            first += n;
        }
        Selected selected(layers.front(), 1);
        CHECK_REFUSED(forced.apply(layers.front(), &selected.top_k), "given for 40 tokens, and more are computed");
    }
}

TEST(more_tokens_than_rows_are_refused) {
    ForcedRoutes forced;
    forced.set({0, 1}, routes(3, 2), kUsed);
    Selected four(0, 4), two(1, 2);
    CHECK_REFUSED(forced.apply(1, &two.top_k), "more are computed");  // before the first layer has told how many
    CHECK_REFUSED(forced.apply(0, &four.top_k), "routes to force were given for 3 tokens, and more are computed");
    CHECK(four.row(0) == (Ids{kNobody, kNobody}));
    forced.set({0, 1}, routes(3, 2), kUsed);  // from the start again
    pass(forced, {0, 1}, 0, 3, 3);
}

TEST(another_number_of_experts_is_refused) {
    ForcedRoutes forced;
    forced.set({0}, routes(3, 1), kUsed);
    Selected three(0, 1, 3), one(0, 1, 1);
    CHECK_REFUSED(forced.apply(0, &three.top_k), "have 2 experts for each token, but layer 0 selects 3");
    CHECK_REFUSED(forced.apply(0, &one.top_k), "but layer 0 selects 1");
    pass(forced, {0}, 0, 3, 3);  // no row was lost
}

TEST(ids_that_are_no_whole_rows_are_refused) {
    ForcedRoutes forced;
    forced.set({0}, routes(2, 1), kUsed);
    CHECK_REFUSED(forced.set({0, 1}, Ids(6, 0), kUsed), "have 6 numbers for 2 layers");
    CHECK_REFUSED(forced.set({}, Ids(6, 0), kUsed), "for 0 layers");
    CHECK_REFUSED(forced.set({0}, Ids(6, 0), 0), "for 1 layers");
    pass(forced, {0}, 0, 2, 2);  // as before
}

TEST(no_layers_force_nothing) {
    ForcedRoutes forced;
    CHECK(!forced.forces(0));
    forced.set({0, 1}, routes(2, 2), kUsed);
    forced.set({}, {}, 0);
    CHECK(!forced.forces(0) && !forced.forces(1));
    CHECK(forced.predicted(0, 1, 1).empty());
}

TEST(no_rows_are_used_up_at_once) {
    ForcedRoutes forced;
    forced.set({0}, {}, kUsed);
    Selected selected(0, 1);
    CHECK_REFUSED(forced.apply(0, &selected.top_k), "given for 0 tokens");
}

TEST(predictions_are_of_the_tokens_under_way) {
    ForcedRoutes forced;
    forced.set({0, 2}, routes(9, 2), kUsed);
    CHECK(forced.predicted(2, 1, 1).empty());
    forced.set_predictions(routes(9, 2, 1000));
    const auto told = [&](int64_t first, int64_t n) {
        Ids ids;
        for (int64_t token = first; token < first + n; ++token) {
            const Ids row = row_of(token, 1, 1000);
            ids.insert(ids.end(), row.begin(), row.end());
        }
        return ids;
    };
    Selected five(0, 5), one(0, 1);
    forced.apply(0, &five.top_k);
    CHECK(forced.predicted(2, 1, 5) == told(0, 5));
    CHECK(forced.predicted(2, 1, 1) == told(4, 1));
    CHECK(forced.predicted(1, 1, 1).empty());
    CHECK(forced.predicted(3, 1, 1).empty());
    forced.apply(0, &one.top_k);
    CHECK(forced.predicted(2, 1, 1) == told(5, 1));
    CHECK(one.row(0) == row_of(5, 0));  // what is predicted is not what is forced
    forced.set_predictions({});
    CHECK(forced.predicted(2, 1, 1).empty());
    CHECK_REFUSED(forced.set_predictions(routes(8, 2)), "32 experts are predicted for 36 that are forced");
    CHECK(!forced.predicts());
    Ids both = routes(9, 2, 1000), farther = routes(9, 2, 2000);
    both.insert(both.end(), farther.begin(), farther.end());
    forced.set_predictions(both);
    CHECK(forced.predicts());
    CHECK(forced.predicted(2, 1, 1) == told(5, 1));
    CHECK(forced.predicted(2, 2, 1) == row_of(5, 1, 2000));
    CHECK(forced.predicted(2, 3, 1).empty());
    forced.set_predictions(routes(9, 2, 1000));
    forced.set({0, 2}, routes(9, 2), kUsed);  // other routes: nothing is predicted for these
    forced.apply(0, &one.top_k);
    CHECK(forced.predicted(2, 1, 1).empty());
}

TEST(forcer_of_a_plain_context) {
    RouteForcer forcer;
    forcer.force({1, 2}, routes(3, 2), kUsed);
    Selected first(1, 2), second(2, 1), other(3, 1);
    CHECK(RouteForcer::on_node(&first.top_k, true, &forcer));
    CHECK(RouteForcer::on_node(&first.top_k, false, &forcer));
    CHECK(first.row(0) == row_of(0, 0) && first.row(1) == row_of(1, 0));
    CHECK(RouteForcer::on_node(&second.top_k, true, &forcer));
    CHECK(RouteForcer::on_node(&second.top_k, false, &forcer));
    CHECK(second.row(0) == row_of(1, 1));
    CHECK(!RouteForcer::on_node(&other.top_k, true, &forcer));
    CHECK(RouteForcer::on_node(&other.top_k, false, &forcer));
    CHECK(other.row(0) == (Ids{kNobody, kNobody}));
    Tensor unreadable = fake_ggml::make_tensor(fake_ggml::kI32, "ffn_moe_topk-1 (copy)", {2, 2});
    CHECK(!RouteForcer::on_node(&unreadable, true, &forcer));
    CHECK_EQUAL(forcer.failure(), "");
    CHECK(!RouteForcer::on_node(&first.top_k, false, &forcer));  // only one row is left
    CHECK(forcer.failure().find("given for 3 tokens") != std::string::npos);
    forcer.force({1, 2}, routes(3, 2), kUsed);
    CHECK_EQUAL(forcer.failure(), "");
    CHECK(RouteForcer::on_node(&first.top_k, false, &forcer));
    forcer.force({}, {}, 0);
    CHECK(!RouteForcer::on_node(&first.top_k, true, &forcer));
}

TEST(predictions_for_layers_before_the_first_forced_one_are_none) {
    edgemoe::ForcedRoutes routes;
    routes.set({2, 0}, {1, 2, 3, 4}, 2);
    routes.set_predictions({5, 6, 7, 8});
    CHECK(routes.predicted(0, 1, 1).empty());  // no token has begun
    CHECK_REFUSED(routes.set({0, -1}, {1, 2}, 1), "negative");
}
