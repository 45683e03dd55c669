// One token's products, computed where its experts are: those of plain loops over the file, whatever the threads.
#include "token_products.h"

#include <deque>
#include <random>

#include "check.h"
#include "fake_ggml.h"
#include "held_disk.h"
#include "page_space.h"
#include "running_hook.h"

using edgemoe::Io;
using edgemoe::page_size;
using edgemoe::TokenProducts;
using edgemoe::ggml::Tensor;
using fake_ggml::make_tensor;

namespace {

constexpr int64_t kColumns = 64;

// A layer's three parts with rows of codes; gate and up multiply one row of input, down as many as there are experts.
class Layer {
   public:
    Layer(uint64_t slab_bytes, uint64_t arena_bytes, std::vector<int32_t> ids)
        : model_(moe_model(slab_bytes)), running(model_, Io::pread, arena_bytes), ids_(std::move(ids)) {
        n_rows = static_cast<int64_t>(slab_bytes) / kColumns;
        const auto n_used = static_cast<int64_t>(ids_.size());
        top_k_ = make_tensor(fake_ggml::kI32, "ffn_moe_topk-0", {n_used, 1});
        top_k_.data = ids_.data();
        std::mt19937 random(7);
        inputs.resize(static_cast<size_t>(kColumns * n_used));
        std::generate(inputs.begin(), inputs.end(), [&] { return static_cast<float>(random() % 256); });
        for (size_t part = 0; part < 3; ++part) {
            input_[part] = make_tensor(fake_ggml::kF32, "", {kColumns, part == 2 ? n_used : 1, 1});
            input_[part].data = inputs.data();
            Tensor& experts = running.loaded->tensors[model_.id_of(0, part)];
            void* const data = experts.data;
            experts = make_tensor(fake_ggml::kCoded, experts.name, {kColumns, n_rows, kExperts});
            experts.data = data;
            Tensor& node = nodes.emplace_back(make_tensor(fake_ggml::kF32, "", {n_rows, n_used, 1}));
            results[part].assign(static_cast<size_t>(n_rows * n_used), -1);
            node.data = results[part].data();
            node.op = fake_ggml::kOpMulMatId;
            node.op_params[3] = 77;
            node.src[0] = &experts;
            node.src[1] = &input_[part == 1 ? 0 : part];
            node.src[2] = &top_k_;
        }
    }

    void put_in(TokenProducts& products, size_t part, std::function<void()> meanwhile = nullptr) {
        products.pass(&nodes[part]);
        CHECK_EQUAL(nodes[part].op, fake_ggml::kOpMulMatId);
        CHECK(products.suit(&nodes[part]));
        products.put_in(static_cast<int>(model_.id_of(0, part)), std::move(meanwhile));
        CHECK_EQUAL(nodes[part].op, fake_ggml::kOpCustom);
    }
    size_t id_of(size_t part) const { return model_.id_of(0, part); }
    bool is_right(size_t part) const {
        for (size_t slot = 0; slot < ids_.size(); ++slot) {
            const auto* slab = reinterpret_cast<const uint8_t*>(model_.bytes_of(model_.id_of(0, part))) +
                               static_cast<uint64_t>(ids_[slot]) * model_.slab_bytes(0, part);
            const float* input = inputs.data() + (part == 2 ? slot * kColumns : 0);
            for (int64_t row = 0; row < n_rows; ++row) {
                float sum = 0;
                for (int64_t i = 0; i < kColumns; ++i) {
                    sum += slab[row * kColumns + i] * input[i];
                }
                if (sum != results[part][slot * static_cast<size_t>(n_rows) + static_cast<size_t>(row)]) {
                    return false;
                }
            }
        }
        return true;
    }

   private:
    const TinyModel model_;

   public:
    Running running;
    int64_t n_rows;
    std::vector<float> inputs;
    std::vector<float> results[3];
    std::deque<Tensor> nodes;

   private:
    std::vector<int32_t> ids_;
    Tensor top_k_{}, input_[3];
};

}  // namespace

TEST(all_threads_together_compute_what_plain_loops_do) {
    for (const uint64_t slab_bytes : {2 * page_size(), uint64_t{100 * kColumns}, uint64_t{kColumns}}) {
        for (const uint64_t arena_bytes : {9 * 3 * slab_bytes + 24 * page_size(), kPlenty}) {
            for (const int n_threads : {1, 2, 5}) {
                Layer layer(slab_bytes, arena_bytes, {6, 1, 3});
                TokenProducts products(*layer.running.store, layer.running.api);
                for (int token = 0; token < 2; ++token) {
                    layer.running.store->acquire(0, 7, {6, 1, 3});
                    for (size_t part = 0; part < 3; ++part) {
                        layer.put_in(products, part);
                    }
                    for (size_t part = 0; part < 3; ++part) {
                        std::fill(layer.results[part].begin(), layer.results[part].end(), -1);
                    }
                    fake_ggml::compute_custom(&layer.nodes[0], n_threads);
                    CHECK(layer.is_right(0) && layer.is_right(1));  // up came at once after gate
                    fake_ggml::compute_custom(&layer.nodes[1], n_threads);
                    fake_ggml::compute_custom(&layer.nodes[2], n_threads);
                    CHECK(layer.is_right(2));
                }
            }
        }
    }
}

TEST(experts_that_were_not_asked_for_are_refused_each_time) {
    Layer layer(2 * page_size(), 9 * 6 * page_size() + 24 * page_size(), {2, 5});
    CHECK(layer.running.store->in_slots());
    TokenProducts products(*layer.running.store, layer.running.api);
    layer.running.store->acquire(0, 7, {2});
    for (int again = 0; again < 2; ++again) {
        products.pass(&layer.nodes[0]);
        CHECK_REFUSED(products.put_in(static_cast<int>(layer.id_of(0)), nullptr), "uses expert 5 that was not asked");
    }
}

TEST(rows_of_an_expert_that_could_not_be_read_are_zero) {
    WithHeldDisk with;
    Layer layer(2 * page_size(), kPlenty, {2, 5});
    TokenProducts products(*layer.running.store, layer.running.api);
    layer.running.store->acquire(0, 7, {2});
    with.disk.fail([](const HeldDisk::Read&) { return true; });
    layer.running.store->request(0, 7, {2, 5});
    layer.put_in(products, 0);
    fake_ggml::compute_custom(&layer.nodes[0]);
    const auto second = layer.results[0].begin() + layer.n_rows;
    CHECK(std::all_of(second, layer.results[0].end(), [](float sum) { return sum == 0; }));
    CHECK(std::any_of(layer.results[0].begin(), second, [](float sum) { return sum != 0; }));
    CHECK_REFUSED(layer.running.store->wait(7), "failed");
}

TEST(what_comes_between_is_waited_for) {
    Layer layer(2 * page_size(), kPlenty, {2, 5});
    TokenProducts products(*layer.running.store, layer.running.api);
    layer.running.store->acquire(0, 7, {2, 5});
    layer.put_in(products, 0);
    Tensor between = make_tensor(fake_ggml::kF32, "a bias", {1});
    products.pass(&between);
    layer.put_in(products, 1);
    fake_ggml::compute_custom(&layer.nodes[0]);
    CHECK(layer.is_right(0) && !layer.is_right(1));
    fake_ggml::compute_custom(&layer.nodes[1]);
    CHECK(layer.is_right(1));
}

TEST(the_same_node_again_is_a_mul_mat_id_until_it_is_put_in) {
    Layer layer(2 * page_size(), kPlenty, {2, 5});
    TokenProducts products(*layer.running.store, layer.running.api);
    layer.running.store->acquire(0, 7, {2, 5});
    const Tensor before[2] = {layer.nodes[0], layer.nodes[1]};
    for (const bool used_between : {true, false}) {
        layer.put_in(products, 0);
        layer.put_in(products, 1);
        if (used_between) {
            fake_ggml::compute_custom(&layer.nodes[0]);
        }
        for (size_t part = 0; part < 2; ++part) {
            products.pass(&layer.nodes[part]);
            CHECK(std::memcmp(&layer.nodes[part], &before[part], sizeof(Tensor)) == 0);
        }
    }
}

TEST(somebody_elses_operations_are_left_alone) {
    Layer layer(2 * page_size(), kPlenty, {2, 5});
    TokenProducts products(*layer.running.store, layer.running.api);
    Tensor other = make_tensor(fake_ggml::kF32, "", {1});
    other.op = fake_ggml::kOpCustom;
    const Tensor before = other;
    products.pass(&other);
    CHECK(std::memcmp(&other, &before, sizeof(Tensor)) == 0);
}

TEST(more_than_one_token_and_long_rows_do_not_suit) {
    Layer layer(2 * page_size(), kPlenty, {2, 5});
    TokenProducts products(*layer.running.store, layer.running.api);
    Tensor node = layer.nodes[0];
    Tensor ids = *node.src[2], input = *node.src[1];
    node.src[1] = &input;
    node.src[2] = &ids;
    CHECK(products.suit(&node));
    ids.ne[1] = 2;
    CHECK(!products.suit(&node));
    ids.ne[1] = 1;
    input.ne[0] = 1 << 20;
    CHECK(!products.suit(&node));
    input.type = fake_ggml::kCoded;  // used as it is
    CHECK(products.suit(&node));
}

TEST(the_calling_thread_does_something_meanwhile_once) {
    Layer layer(2 * page_size(), kPlenty, {2, 5});
    TokenProducts products(*layer.running.store, layer.running.api);
    layer.running.store->acquire(0, 7, {2, 5});
    int n_done = 0;
    const std::thread::id caller = std::this_thread::get_id();
    layer.put_in(products, 0, [&] { n_done += std::this_thread::get_id() == caller ? 1 : 100; });
    layer.put_in(products, 1);
    for (size_t part = 0; part < 2; ++part) {
        fake_ggml::compute_custom(&layer.nodes[part], 4);
        CHECK(layer.is_right(part));
    }
    CHECK_EQUAL(n_done, 1);
}
