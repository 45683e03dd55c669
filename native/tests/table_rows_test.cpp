// Rows of a table in few pages, counted by the kernel's page tables.
#include "table_rows.h"

#include <algorithm>
#include <random>
#include <vector>

#include "check.h"
#include "page_space.h"
#include "running_hook.h"

using edgemoe::Io;
using edgemoe::page_size;
using edgemoe::Pages;
using edgemoe::TableRows;

namespace {

constexpr size_t kPages = 64;
constexpr size_t kLead = 40;  // bytes of the first page that belong to another tensor

// The table starts within a page and ends within one; a row is a third of a page and a bit.
struct Table {
    explicit Table(size_t most_pages)
        : space(kPages),
          row_bytes(page_size() / 3 + 16),
          n_rows(static_cast<int32_t>(((kPages - 1) * page_size() + 100) / row_bytes)),
          data(space.at(0) + kLead),
          rows(data, static_cast<uint64_t>(n_rows) * row_bytes, row_bytes, most_pages * page_size()) {}

    std::byte* row(int32_t number) const { return data + static_cast<size_t>(number) * row_bytes; }
    size_t page_of(const std::byte* address) const { return static_cast<size_t>(address - space.at(0)) / page_size(); }
    // Takes rows and writes what is to be read; each byte of them has to be there afterwards.
    std::vector<Pages> take(const std::vector<int32_t>& numbers) {
        std::vector<Pages> missing = rows.take(numbers);
        for (const Pages& stretch : missing) {
            CHECK(stretch.begin() >= data && stretch.bytes() > 0);
            CHECK(stretch.begin() + stretch.bytes() <= row(n_rows));
            CHECK(rows.offset_of(stretch) == static_cast<uint64_t>(stretch.begin() - data));
            for (size_t i = 0; i < stretch.bytes(); ++i) {
                stretch.begin()[i] = value(stretch.begin() + i);
            }
        }
        for (const int32_t number : numbers) {
            for (size_t i = 0; i < row_bytes; ++i) {
                CHECK(row(number)[i] == value(row(number) + i));
            }
        }
        return missing;
    }
    std::byte value(const std::byte* at) const { return static_cast<std::byte>((at - data) % 251 + 1); }

    PageSpace space;
    const size_t row_bytes;
    const int32_t n_rows;
    std::byte* const data;
    TableRows rows;
};

// A model whose one dense tensor is a table of 1000 rows, ending with its file or with experts behind it.
constexpr uint64_t kRow = 1200, kRows = 1000, kMost = 12;

TinyModel table_model(uint64_t seed) {
    TinyModel model({{kExperts, {700, 700, 700}}, {0, {}}, {kExperts, {700, 700, 700}}}, {kRow * kRows}, 2, seed);
    model.tensors[0].row_bytes = kRow;
    model.tensors[0].most_bytes = kMost * page_size();
    return model;
}

// The node that looks tokens up, and compares what it finds with the file.
class Lookup {
   public:
    Lookup(Running& running, const TinyModel& model, std::vector<int32_t> tokens) : tokens_(std::move(tokens)) {
        input_ = fake_ggml::make_tensor(fake_ggml::kI32, "inp_tokens", {static_cast<int64_t>(tokens_.size())});
        input_.op = running.api.op_none;
        input_.data = tokens_.data();
        node = fake_ggml::make_tensor(fake_ggml::kF32, "inp_embd", {1, input_.ne[0]});
        node.op = fake_ggml::kOpGetRows;
        node.src[0] = &running.loaded->tensors[0];
        node.src[1] = &input_;
        graph.add(node, [&model, this](edgemoe::ggml::Tensor* self) {
            const auto* data = static_cast<const std::byte*>(self->src[0]->data);
            right = true;
            for (const int32_t token : tokens_) {
                const uint64_t at = static_cast<uint64_t>(token) * kRow;
                right = right && std::memcmp(data + at, model.bytes_of(0) + at, kRow) == 0;
            }
        });
    }
    bool run(Running& running) {
        running.hook->begin();
        return graph.run(*running.hook);
    }

    fake_ggml::Graph graph;
    edgemoe::ggml::Tensor node;
    bool right = false;

   private:
    std::vector<int32_t> tokens_;
    edgemoe::ggml::Tensor input_;
};

void tokens_are_looked_up(Io io) {
    for (uint64_t seed = 0; seed < 4; ++seed) {
        const TinyModel model = table_model(seed);
        Running running(model, io, kPlenty);
        CHECK_EQUAL(running.store->stats().dense_bytes, 0U);
        std::mt19937 random(static_cast<uint32_t>(seed));
        for (int batch = 0; batch < 200; ++batch) {
            std::vector<int32_t> tokens(random() % 6 + 1);
            for (int32_t& token : tokens) {
                token = static_cast<int32_t>(batch % 20 == 0 ? kRows - 1 : random() % kRows);
            }
            Lookup lookup(running, model, tokens);
            CHECK(lookup.run(running));
            CHECK_EQUAL(running.hook->take_failure(), "");
            CHECK(lookup.right);
        }
        const auto* data = static_cast<const std::byte*>(running.loaded->tensors[0].data);
        const auto* start = reinterpret_cast<std::byte*>(edgemoe::page_floor(reinterpret_cast<uintptr_t>(data)));
        CHECK(count_resident(start, edgemoe::page_ceil(kRow * kRows + page_size())) <= kMost);
        CHECK_EQUAL(running.store->stats().bytes_read, 0U);  // no expert's
        CHECK(running.store->stats().dense_bytes > 0);
    }
}

}  // namespace

TEST(only_pages_of_the_rows_are_held) {
    Table table(8);
    CHECK_EQUAL(table.take({}).size(), 0U);
    const auto missing = table.take({30, 30, 90});
    CHECK_EQUAL(missing.size(), 2U);
    CHECK_EQUAL(table.space.held() * page_size(), table.rows.bytes());
    CHECK(table.space.held() <= 4);
    CHECK_EQUAL(table.take({90, 30}).size(), 0U);
}

TEST(adjacent_pages_are_one_stretch) {
    Table table(kPages);
    std::vector<int32_t> all(static_cast<size_t>(table.n_rows));
    for (int32_t row = 0; row < table.n_rows; ++row) {
        all[static_cast<size_t>(row)] = row;
    }
    const auto missing = table.take(all);
    CHECK_EQUAL(missing.size(), 1U);
    CHECK(missing.front().begin() == table.data);  // neither the other tensor's bytes before it, nor those after it
    CHECK_EQUAL(missing.front().bytes(), static_cast<uint64_t>(table.n_rows) * table.row_bytes);
}

TEST(rows_not_asked_for_longest_leave) {
    Table table(3);
    const auto page_of = [&](int32_t row) { return table.page_of(table.row(row)); };
    const auto in_one_page = [&](int32_t row) {  // the next one that is
        while (page_of(row) != table.page_of(table.row(row + 1) - 1)) {
            ++row;
        }
        return row;
    };
    const int32_t first = in_one_page(0), second = in_one_page(30), third = in_one_page(60), last = in_one_page(90);
    for (const int32_t row : {first, second, first, third, last}) {
        table.take({row});
    }
    const auto held = [&](int32_t row) { return table.space.held(page_of(row), 1) == 1; };
    CHECK(held(first) && !held(second) && held(third) && held(last));
    CHECK_EQUAL(table.rows.bytes(), 3 * page_size());
}

TEST(what_is_held_never_exceeds_its_share) {
    std::mt19937 random(5);
    Table table(10);
    for (int round = 0; round < 2000; ++round) {
        std::vector<int32_t> rows(random() % 5 + 1);
        for (int32_t& row : rows) {
            const auto anywhere = static_cast<int32_t>(random() % static_cast<uint32_t>(table.n_rows));
            row = random() % 2 == 0 ? anywhere : anywhere % 12;
        }
        table.take(rows);
        CHECK(table.rows.bytes() <= 10 * page_size());
        if (round % 100 == 0) {
            CHECK_EQUAL(table.space.held() * page_size(), table.rows.bytes());
        }
    }
}

TEST(rows_that_could_not_be_read_are_read_again) {
    Table table(8);
    table.take({10});
    const auto missing = table.rows.take({10, 50});
    CHECK_EQUAL(missing.size(), 1U);
    table.rows.drop(missing);
    CHECK_EQUAL(table.take({50}).size(), 1U);
    CHECK_EQUAL(table.take({10, 50}).size(), 0U);
}

TEST(rows_of_no_table_and_too_many_rows_are_refused) {
    Table table(4);
    table.take({7});
    const uint64_t before = table.rows.bytes();
    CHECK_REFUSED(table.rows.take({7, table.n_rows}), "was asked of a table of");
    CHECK_REFUSED(table.rows.take({-1}), "row -1");
    CHECK_REFUSED(table.rows.take({0, 10, 20, 30, 40}), "lower n_ubatch");
    CHECK_EQUAL(table.rows.bytes(), before);
    CHECK_EQUAL(table.take({7}).size(), 0U);
}

TEST(tokens_are_looked_up_direct) { tokens_are_looked_up(Io::direct); }
TEST(tokens_are_looked_up_mmap) { tokens_are_looked_up(Io::mmap); }
TEST(tokens_are_looked_up_pread) { tokens_are_looked_up(Io::pread); }

TEST(file_cut_short_is_said_and_read_again_once_it_is_whole) {
    const TinyModel model = table_model(2);
    Running running(model, Io::pread, kPlenty);
    ScratchFile& scratch = *model.files[static_cast<size_t>(model.tensors[0].file)];
    scratch.truncate(model.tensors[0].offset + 100 * kRow);
    for (int round = 0; round < 3; ++round) {
        Lookup cut(running, model, {50, 500});
        CHECK(!cut.run(running));
        CHECK(running.hook->take_failure().find(scratch.path()) != std::string::npos);
    }
    scratch.restore();
    Lookup whole(running, model, {50, 500});
    whole.run(running);
    CHECK(whole.right);
}

TEST(another_use_of_the_table_is_refused) {
    const TinyModel model = table_model(1);
    Running running(model, Io::pread, kPlenty);
    const auto refused = [&](const auto& change) {
        Lookup lookup(running, model, {3});
        fake_ggml::Graph graph;
        change(lookup.node);
        graph.add(lookup.node);
        running.hook->begin();
        CHECK(!graph.run(*running.hook));
        CHECK(running.hook->take_failure().find("newer edgemoe") != std::string::npos);
    };
    refused([](edgemoe::ggml::Tensor& node) { node.op = fake_ggml::kOpView; });
    refused([](edgemoe::ggml::Tensor& node) { std::swap(node.src[0], node.src[1]); });
    refused([](edgemoe::ggml::Tensor& node) { node.src[1]->op = fake_ggml::kOpView; });
}

TEST(table_has_one_place_and_whole_rows) {
    const TinyModel model = table_model(1);
    Running running(model, Io::pread, kPlenty);
    edgemoe::ggml::Tensor second = running.loaded->tensors[0];
    CHECK_EQUAL(running.loaded->memory->iface.init_tensor(running.loaded->memory, &second),
                edgemoe::ggml::kStatusFailed);
    CHECK(running.buffer->failure().find("two tensors") != std::string::npos);
    edgemoe::TensorSpec odd = model.tensors[0];
    odd.row_bytes = 7;
    CHECK_REFUSED(running.store->add_tensor(odd), "rows of 7 bytes");
}
