#include "router_copy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "fake_ggml.h"

using edgemoe::RouterCopy;
using edgemoe::ggml::Tensor;

namespace {

using Numbers = std::vector<float>;

RouterCopy copy_of(Numbers& weights, int64_t n_embd) {
    Tensor tensor =
        fake_ggml::make_tensor(fake_ggml::kF32, "router", {n_embd, static_cast<int64_t>(weights.size()) / n_embd});
    tensor.data = weights.data();
    return RouterCopy(tensor);
}

double largest(const float* row, size_t n) {
    return std::fabs(*std::max_element(row, row + n, [](float a, float b) { return std::fabs(a) < std::fabs(b); }));
}

// No farther from the product than rounding each factor to the nearest step can lead.
void compare(Numbers weights, const Numbers& state) {
    const size_t n = state.size();
    const Numbers found = copy_of(weights, static_cast<int64_t>(n)).scores(state);
    CHECK_EQUAL(found.size() * n, weights.size());
    const double state_error = largest(state.data(), n) / 4095 / 2;
    for (size_t row = 0; row < found.size(); ++row) {
        const float* its = &weights[row * n];
        const double weight_error = largest(its, n) / 127 / 2;
        double exact = 0, most = 0;
        for (size_t i = 0; i < n; ++i) {
            exact += static_cast<double>(its[i]) * state[i];
            most += std::fabs(its[i]) * state_error + std::fabs(state[i]) * weight_error + weight_error * state_error;
        }
        CHECK(std::fabs(found[row] - exact) <= most * 1.001 + 1e-6);
    }
}

Numbers draw(std::mt19937& random, size_t n, float scale) {
    std::normal_distribution<float> normal(0, scale);
    Numbers numbers(n);
    std::generate(numbers.begin(), numbers.end(), [&] { return normal(random); });
    return numbers;
}

}  // namespace

TEST(scores_are_the_product_but_for_rounding) {
    std::mt19937 random(5);
    for (const size_t n : {1U, 21U, 2048U, 4096U, 5001U}) {
        for (const float scale : {1e-6F, 0.1F, 300.0F}) {
            Numbers state = draw(random, n, scale);
            state[n / 2] *= 50;  // one dimension far beyond the others is usual
            compare(draw(random, 7 * n, 0.02F), state);
        }
    }
}

TEST(largest_numbers_do_not_overflow) {
    const size_t n = 9000;
    Numbers weights(2 * n, 1.0F);
    std::fill(weights.begin() + n, weights.end(), -1.0F);
    compare(weights, Numbers(n, 3.0F));
}

TEST(rows_are_rounded_each_for_itself) {
    Numbers weights{1000, 0, 0.001F, 0.0005F};
    const Numbers found = copy_of(weights, 2).scores({1, 1});
    CHECK(std::fabs(found[0] - 1000) < 1 && std::fabs(found[1] - 0.0015F) < 1e-5F);
}

TEST(what_is_no_number_counts_as_nothing) {
    Numbers weights{1, 2, 0, 0, 3, std::nanf("")};
    const Numbers found = copy_of(weights, 2).scores({2, std::nanf("")});
    CHECK(std::fabs(found[0] - 2) < 0.05F && found[1] == 0 && std::fabs(found[2] - 6) < 0.05F);
    const float infinite = std::numeric_limits<float>::infinity();
    CHECK(copy_of(weights, 2).scores({infinite, 1}) == Numbers(3, 0));
}
