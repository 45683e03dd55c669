#include "slots.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "check.h"
#include "resident_pages.h"
#include "tiny_model.h"

using edgemoe::Io;
using edgemoe::page_size;
using edgemoe::Slabs;
using edgemoe::Slots;

namespace {

constexpr uint64_t kHugePage = uint64_t{2} << 20;

// The model's tensors at their places, in address space that nobody writes to.
class Placed {
   public:
    explicit Placed(const TinyModel& model, std::set<size_t> left_out = {}) : slabs(Io::pread) {
        for (const auto& file : model.files) {
            slabs.add_file(file->path());
        }
        for (size_t id = 0; id < model.tensors.size(); ++id) {
            slabs.add_tensor(model.tensors[id]);
            if (left_out.count(id) == 0) {
                const uint64_t n = slabs.place_size(static_cast<int>(id));
                regions_.emplace_back(edgemoe::reserve_memory(n), n);
                slabs.place(static_cast<int>(id), regions_.back().first);
            }
        }
    }
    ~Placed() {
        for (const auto& [base, n] : regions_) {
            edgemoe::release_memory(base, n);
        }
    }
    Placed(const Placed&) = delete;
    Placed& operator=(const Placed&) = delete;

    const Slabs::Tensor& tensor(size_t id) const { return slabs.tensors()[id]; }
    Slabs slabs;

   private:
    std::vector<std::pair<std::byte*, uint64_t>> regions_;
};

TinyModel two_kinds() {
    const uint64_t page = page_size();
    return {{{8, {page, 2 * page}}, {0, {}}, {6, {page, 2 * page}}, {10, {3 * page, page}}, {10, {3 * page, page}}},
            {100},
            1,
            3};
}

bool lays_out(const TinyModel& model, uint64_t arena_pages) {
    const Placed placed(model);
    Slots slots;
    slots.lay_out(placed.slabs, arena_pages * page_size());
    return slots.laid_out();
}

}  // namespace

TEST(slots_are_apart_and_within_the_arena) {
    const TinyModel model = two_kinds();
    const Placed placed(model);
    const uint64_t arena = 160 * page_size();
    Slots slots;
    slots.lay_out(placed.slabs, arena);
    CHECK(slots.laid_out());
    CHECK(slots.same_kind(0, 2) && !slots.same_kind(0, 3));
    std::set<std::pair<std::byte*, std::byte*>> taken;
    uint64_t bytes = 0;
    for (const int layer : {0, 3}) {
        const int32_t n = slots.n_slots(layer);
        CHECK(n >= (layer == 0 ? 8 : 10));
        for (int32_t i = 0; i < n; ++i) {
            CHECK(slots.has_room(layer));
            const int32_t slot = slots.take(layer);
            for (const size_t part : {0U, 1U}) {
                const Slabs::Tensor& tensor = placed.tensor(model.id_of(layer, part));
                std::byte* at = slots.address(tensor, slot);
                CHECK_EQUAL(reinterpret_cast<uintptr_t>(at) % page_size(), tensor.spec.offset % page_size());
                CHECK(at == slots.address(tensor, 0) + static_cast<uint64_t>(slot) * slots.stride(tensor));
                std::memset(at, 1, tensor.slab_bytes);
                taken.emplace(at, at + tensor.slab_bytes);
                bytes += slots.stride(tensor);
            }
        }
        CHECK(!slots.has_room(layer) && !slots.has_room(layer == 0 ? 2 : layer));
    }
    CHECK(bytes <= arena);
    for (auto slab = taken.begin(); std::next(slab) != taken.end(); ++slab) {
        CHECK(slab->second <= std::next(slab)->first);
    }
    slots.give(0, 3);
    CHECK(slots.has_room(2) && !slots.has_room(3));
    CHECK_EQUAL(slots.take(2), 3);
}

TEST(neighbours_that_begin_elsewhere_in_their_page_have_room) {
    const TinyModel model = two_kinds();
    const Placed placed(model);
    Slots slots;
    slots.lay_out(placed.slabs, 160 * page_size());
    const Slabs::Tensor& first = placed.tensor(model.id_of(0, 1));
    const Slabs::Tensor& other = placed.tensor(model.id_of(2, 1));
    CHECK(first.spec.offset % page_size() != other.spec.offset % page_size());
    CHECK(slots.address(first, 4) + first.slab_bytes <= slots.address(other, 5));
    CHECK(slots.address(other, 4) + other.slab_bytes <= slots.address(first, 5));
}

// Huge pages are committed whole: none may reach beyond what the arena has for the part.
TEST(stretches_begin_at_huge_pages) {
    const TinyModel model({{8, {kHugePage / 2}}, {8, {kHugePage / 2}}}, {}, 1, 5);
    const Placed placed(model);
    Slots slots;
    slots.lay_out(placed.slabs, 12 * kHugePage / 2);
    CHECK(slots.laid_out());
    const Slabs::Tensor& tensor = placed.tensor(model.id_of(0, 0));
    CHECK_EQUAL(reinterpret_cast<uintptr_t>(slots.address(tensor, 0)) % kHugePage, tensor.spec.offset % page_size());
}

TEST(slabs_that_are_not_whole_pages_get_none) {
    const uint64_t page = page_size();
    CHECK(lays_out({{{8, {page, page}}, {8, {page, page}}}, {}, 1, 1}, 40));
    CHECK(!lays_out({{{8, {page, page + 32}}, {8, {page, page}}}, {}, 1, 1}, 40));
}

TEST(a_layer_that_would_not_fit_means_none) { CHECK(!lays_out(two_kinds(), 40)); }

TEST(a_kind_of_one_layer_holds_it_whole_unless_that_takes_too_much) {
    const uint64_t page = page_size();
    std::vector<TinyLayer> layers(9, {8, {page, page}});
    layers.push_back({8, {2 * page, page}});
    const TinyModel model(layers, {}, 1, 1);
    const Placed placed(model);
    Slots slots;
    slots.lay_out(placed.slabs, 200 * page_size());
    CHECK(slots.laid_out());
    CHECK_EQUAL(slots.n_slots(9), 8);
    CHECK(slots.n_slots(0) >= 36 && slots.n_slots(0) < 72);
    CHECK(!lays_out(model, 120));
}

TEST(borrowed_slots_come_last_and_are_given_back) {
    const TinyModel model({{8, {kHugePage / 2}}, {8, {kHugePage / 2}}}, {}, 1, 5);
    const Placed placed(model);
    Slots slots;
    slots.lay_out(placed.slabs, 9 * kHugePage / 2, 4 * kHugePage / 2);
    const Slabs::Tensor& tensor = placed.tensor(model.id_of(0, 0));
    const int32_t own = slots.n_slots(0);
    CHECK(own >= 8);
    slots.borrow();
    CHECK(slots.borrowing());
    const int32_t n = slots.n_slots(0);
    CHECK(n >= own + 3);
    CHECK_EQUAL(slots.bytes(), slots.stride(tensor) * static_cast<uint64_t>(n));
    slots.borrow();  // once more changes nothing
    std::set<int32_t> taken;
    while (slots.has_room(0)) {
        const int32_t slot = slots.take(0);
        std::memset(slots.address(tensor, slot), 1, tensor.slab_bytes);
        taken.insert(slot);
    }
    CHECK_EQUAL(taken.size(), static_cast<size_t>(n));
    CHECK_EQUAL(*taken.rbegin(), n - 1);
    for (const int32_t slot : taken) {
        CHECK_EQUAL(slots.is_borrowed(0, slot), slot >= own);
        if (slot != 0 && slot != 3) {
            slots.give(0, slot);
        }
    }
    slots.repay();
    CHECK(!slots.borrowing());
    CHECK_EQUAL(slots.n_slots(0), own);
    std::byte* const first = slots.address(tensor, 0) - tensor.spec.offset % page_size();
    CHECK_EQUAL(count_resident(first + slots.stride(tensor) * static_cast<uint64_t>(own),
                               slots.stride(tensor) * static_cast<uint64_t>(n - own)),
                0U);
    CHECK(*slots.address(tensor, 3) == std::byte{1});
    int32_t n_free = 0;
    for (; slots.has_room(0); ++n_free) {
        const int32_t slot = slots.take(0);
        CHECK(slot < own && slot != 0 && slot != 3);
    }
    CHECK_EQUAL(n_free, own - 2);
}

TEST(nothing_is_borrowed_that_no_slab_needs) {
    const uint64_t page = page_size();
    const TinyModel model({{8, {page, page}}, {8, {page, page}}}, {}, 1, 1);
    const Placed placed(model);
    Slots slots;
    slots.lay_out(placed.slabs, 45 * page, 100 * page);
    slots.borrow();
    CHECK_EQUAL(slots.n_slots(0), 16);
}

TEST(layers_that_llama_cpp_leaves_out_take_none) {
    const TinyModel model = two_kinds();
    const Placed placed(model, {model.id_of(3, 0), model.id_of(3, 1), model.id_of(4, 0), model.id_of(4, 1)});
    Slots slots;
    slots.lay_out(placed.slabs, 50 * page_size());
    CHECK(slots.laid_out());
    CHECK(slots.n_slots(0) > 8);
    CHECK(!slots.same_kind(0, 3));
}
