// Forecast against the textbook: the mixture written down as sums over plain vectors, victims sought by looking at all.
#include "forecast.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <random>

#include "check.h"

using edgemoe::Eviction;
using edgemoe::Forecast;

namespace {

using Experts = std::vector<int32_t>;

// Layers of `n` experts each, of which a token uses `used`.
class Textbook {
   public:
    Textbook(int n_layer, int n, int used, double first_layer)
        : present(static_cast<size_t>(n_layer * n), false),
          n_layer_(n_layer),
          n_(n),
          used_(used),
          first_layer_(first_layer) {
        for (std::vector<double>& q : q_) {
            q.assign(present.size(), static_cast<double>(used) / n);
        }
        p.assign(present.size(), static_cast<double>(used) / n);
        w_.fill(0.2);
        visited_.assign(static_cast<size_t>(n_layer), false);
    }

    void routed(int layer, int n_tokens, const Experts& experts) {
        visited_[static_cast<size_t>(layer)] = true;
        if (n_tokens == 1) {
            learn(layer, experts);
        }
        for (size_t j = 1; j < 5; ++j) {
            const double half_life = std::array<double, 5>{0, 1, 4, 16, 64}[j];
            const double g = std::exp2(-std::min(n_tokens, 32) / half_life);
            for (int32_t e = 0; e < n_; ++e) {
                const auto c = static_cast<double>(std::count(experts.begin(), experts.end(), e));
                double& q = q_[j][at(layer, e)];
                q = std::max(1e-12, g * q + (1 - g) * (c / n_tokens));
            }
        }
        mix(layer);
    }

    void prefer(int layer, const Experts& experts) {
        const auto m = static_cast<double>(experts.size());
        const double s = std::sqrt(m / n_);
        for (int32_t e = 0; e < n_; ++e) {
            double& q = q_[0][at(layer, e)];
            q = used_ * (1 - s) / n_;
            if (std::find(experts.begin(), experts.end(), e) != experts.end()) {
                q += used_ * s / m;
            }
            for (size_t j = 1; j < 5 && !visited_[static_cast<size_t>(layer)]; ++j) {
                q_[j][at(layer, e)] = q;
            }
        }
        mix(layer);
    }

    // Of all that are present and not in `offered`; the first of the smallest.
    int32_t victim(int layer, const std::vector<bool>& offered) const {
        int32_t best = Eviction::kNone;
        double least = 0;
        for (int of = 0; of < n_layer_; ++of) {
            const int d = 1 + (of - layer - 1 + n_layer_) % n_layer_;
            for (int32_t e = 0; e < n_; ++e) {
                const size_t i = at(of, e);
                const double worth = of == 0 ? first_layer_ : 1;
                const double key = p[i] * (worth / (static_cast<double>(d) / n_layer_ + 1.0));
                if (present[i] && !offered[i] && (best == Eviction::kNone || key < least)) {
                    best = static_cast<int32_t>(i);
                    least = key;
                }
            }
        }
        return best;
    }

    std::vector<double> p;
    std::vector<bool> present;

   private:
    size_t at(int layer, int32_t expert) const { return static_cast<size_t>(layer * n_ + expert); }

    void learn(int layer, const Experts& experts) {
        std::array<double, 5> share{};
        for (const int32_t e : experts) {
            double total = 0;
            for (size_t i = 0; i < 5; ++i) {
                total += w_[i] * q_[i][at(layer, e)];
            }
            for (size_t i = 0; i < 5; ++i) {
                share[i] += w_[i] * q_[i][at(layer, e)] / total / used_;
            }
        }
        for (size_t i = 0; i < 5; ++i) {
            w_[i] = (1 - 0.02) * w_[i] + 0.02 * ((1 - 0.02) * share[i] + 0.02 / 5);
        }
    }
    void mix(int layer) {
        for (int32_t e = 0; e < n_; ++e) {
            double sum = 0;
            for (size_t i = 0; i < 5; ++i) {
                sum += w_[i] * q_[i][at(layer, e)];
            }
            p[at(layer, e)] = sum;
        }
    }

    const int n_layer_, n_, used_;
    const double first_layer_;
    std::array<std::vector<double>, 5> q_;
    std::array<double, 5> w_{};
    std::vector<bool> visited_;
};

Experts draw(std::mt19937& random, int n, int used) {
    Experts all(static_cast<size_t>(n));
    for (int32_t e = 0; e < n; ++e) {
        all[static_cast<size_t>(e)] = e;
    }
    // The lower numbers more often, or there would be nothing to forecast.
    for (int k = 0; k < used; ++k) {
        const auto left = static_cast<uint32_t>(n - k);
        std::swap(all[static_cast<size_t>(k)],
                  all[static_cast<size_t>(k) + std::min(random() % left, random() % left)]);
    }
    all.resize(static_cast<size_t>(used));
    return all;
}

void compare(int n_layer, int n, int used, int n_passes, uint32_t seed) {
    std::mt19937 random(seed);
    const double first_layer = seed % 2 == 0 ? 1 : 3;
    Forecast forecast(first_layer);
    forecast.resize(std::vector<int>(static_cast<size_t>(n_layer), n));
    Textbook textbook(n_layer, n, used, first_layer);
    const auto prefer = [&](int layer) {
        const Experts preferred = draw(random, n, static_cast<int>(random() % static_cast<uint32_t>(n + 1)));
        forecast.prefer(layer, preferred);
        textbook.prefer(layer, preferred);
    };
    prefer(0);  // before anything is known of the model
    for (int pass = 0; pass < n_passes; ++pass) {
        const int n_tokens = random() % 8 == 0 ? static_cast<int>(random() % 100) + 1 : 1;
        for (int layer = 0; layer < n_layer; ++layer) {
            if (random() % 16 == 0) {
                prefer(static_cast<int>(random() % static_cast<uint32_t>(n_layer)));
            }
            Experts experts;
            for (int token = 0; token < n_tokens; ++token) {
                const Experts row = draw(random, n, used);
                experts.insert(experts.end(), row.begin(), row.end());
            }
            forecast.routed(layer, n_tokens, experts);
            textbook.routed(layer, n_tokens, experts);
            for (size_t i = 0; i < textbook.p.size(); ++i) {
                CHECK(std::abs(forecast.probability(static_cast<int32_t>(i)) - textbook.p[i]) <= 1e-12);
            }
            for (const int32_t expert : experts) {
                const int32_t entry = layer * n + expert;
                random() % 2 == 0 ? forecast.touch(entry) : forecast.admit(entry);
                textbook.present[static_cast<size_t>(entry)] = true;
            }
            const auto gone = static_cast<int32_t>(random() % textbook.present.size());
            forecast.remove(gone);
            textbook.present[static_cast<size_t>(gone)] = false;
            // A victim may be pinned: then it is passed over, and stays.
            std::vector<bool> offered(textbook.present.size(), false);
            forecast.seek(layer);
            for (uint32_t i = random() % 6; i > 0; --i) {
                const int32_t victim = forecast.next_victim();
                CHECK_EQUAL(victim, textbook.victim(layer, offered));
                if (victim == Eviction::kNone) {
                    break;
                }
                offered[static_cast<size_t>(victim)] = true;
                if (random() % 2 == 0) {
                    forecast.remove(victim);
                    textbook.present[static_cast<size_t>(victim)] = false;
                }
            }
        }
    }
}

constexpr int kN = 16;

// A token of two experts each time, and all of one layer in memory.
Forecast after(const Experts& preferred, const std::vector<Experts>& tokens) {
    Forecast forecast;
    forecast.resize({kN});
    forecast.prefer(0, preferred);
    for (const Experts& token : tokens) {
        forecast.routed(0, 1, token);
    }
    for (int32_t entry = 0; entry < kN; ++entry) {
        forecast.admit(entry);
    }
    return forecast;
}

Experts victims_of(Forecast& forecast, int layer) {
    Experts victims;
    forecast.seek(layer);
    for (int32_t entry = forecast.next_victim(); entry != Eviction::kNone; entry = forecast.next_victim()) {
        victims.push_back(entry);
        CHECK(victims.size() <= 1000);
    }
    return victims;
}

}  // namespace

TEST(one_layer_as_the_textbook) { compare(1, 8, 2, 600, 1); }
TEST(two_layers_as_the_textbook) { compare(2, 5, 1, 400, 2); }
TEST(many_layers_as_the_textbook) { compare(7, 12, 3, 200, 3); }
TEST(all_experts_used_as_the_textbook) { compare(3, 4, 4, 200, 4); }
TEST(layers_of_one_expert_as_the_textbook) { compare(5, 1, 1, 100, 5); }

TEST(nothing_known_and_nothing_there) {
    Forecast forecast;
    forecast.resize({4, 4});
    CHECK(victims_of(forecast, 0).empty());
    forecast.admit(5);
    forecast.touch(2);
    CHECK_EQUAL(victims_of(forecast, 1).size(), 2U);
    forecast.remove(2);
    CHECK(victims_of(forecast, 1) == Experts{5});
    forecast.routed(0, 0, {});  // no tokens: nothing learnt
    forecast.routed(0, 1, {1, 2});
    CHECK(forecast.probability(1) > forecast.probability(0));
    CHECK_EQUAL(forecast.probability(4), 0.5);
}

TEST(of_equals_the_layer_that_comes_later_leaves) {
    Forecast forecast;
    forecast.resize({2, 2, 2});
    for (int layer = 0; layer < 3; ++layer) {
        forecast.prefer(layer, {});
    }
    forecast.routed(0, 1, {0, 1});
    for (int32_t entry = 2; entry < 6; ++entry) {
        forecast.admit(entry);
    }
    CHECK(victims_of(forecast, 0) == (Experts{4, 5, 2, 3}));
    CHECK(victims_of(forecast, 1) == (Experts{2, 3, 4, 5}));  // layer 1 has just been passed
    CHECK(victims_of(forecast, 2) == (Experts{4, 5, 2, 3}));
}

TEST(layers_may_differ_in_their_experts) {
    Forecast forecast;
    forecast.resize({3, 1, 5});
    forecast.routed(2, 1, {4});
    forecast.admit(8);
    forecast.admit(7);
    CHECK(victims_of(forecast, 2) == (Experts{7, 8}));
    CHECK(forecast.probability(8) > forecast.probability(3) / 5);
    CHECK_EQUAL(forecast.probability(3), 1.0);  // the only one of its layer
}

TEST(preferred_leave_last_until_something_is_known) {
    Forecast forecast = after({3, 12}, {{0, 1}});
    Experts victims = victims_of(forecast, 0);
    std::sort(victims.end() - 4, victims.end());
    CHECK(Experts(victims.end() - 4, victims.end()) == (Experts{0, 1, 3, 12}));
}

TEST(preferred_in_vain_leave_before_what_is_used) {
    std::mt19937 random(6);
    std::vector<Experts> tokens;
    for (int i = 0; i < 300; ++i) {  // of 8 .. 15; the preferred ones are never right
        const auto first = static_cast<int32_t>(random() % 8), second = static_cast<int32_t>(1 + random() % 7);
        tokens.push_back({8 + first, 8 + (first + second) % 8});
    }
    Forecast misled = after({0, 1, 2, 3}, tokens);
    Experts first_half = victims_of(misled, 0);
    first_half.resize(8);
    CHECK(std::all_of(first_half.begin(), first_half.end(), [](int32_t entry) { return entry < 8; }));
}

TEST(preferred_rightly_count_for_more_than_a_stranger) {
    std::mt19937 random(7);
    std::vector<Experts> tokens;
    for (int i = 0; i < 300; ++i) {
        tokens.push_back(draw(random, 15, 2));  // all but the last
    }
    Forecast right = after({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}, tokens);
    right.prefer(0, {0, 1, 2});
    const double before = right.probability(0);
    right.prefer(0, {});
    CHECK(right.probability(0) < before);
}

TEST(prompt_does_not_wipe_out_what_was) {
    Forecast forecast;
    forecast.resize({4});
    for (int i = 0; i < 200; ++i) {
        forecast.routed(0, 1, {0});
    }
    forecast.routed(0, 512, Experts(512, 1));
    CHECK(forecast.probability(0) > 10 * forecast.probability(2));
    CHECK(forecast.probability(1) > forecast.probability(0));
}

TEST(averages_end_at_their_least) {
    Forecast forecast;
    forecast.resize({2});
    forecast.prefer(0, {0});
    for (int i = 0; i < 10000; ++i) {
        forecast.routed(0, 1, {0});
    }
    CHECK(forecast.probability(1) >= 1e-13);
    CHECK(forecast.probability(1) < 1e-1);
    CHECK(forecast.probability(0) > 0.9);
}

TEST(resize_forgets_everything) {
    Forecast forecast = after({1}, {{0, 1}, {0, 1}});
    forecast.resize({kN});
    CHECK(victims_of(forecast, 0).empty());
    forecast.routed(0, 1, {2, 3});
    Forecast fresh = after({}, {{2, 3}});
    for (int32_t entry = 0; entry < kN; ++entry) {
        CHECK_EQUAL(forecast.probability(entry), fresh.probability(entry));
    }
}
