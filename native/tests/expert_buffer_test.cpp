#include "expert_buffer.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "fake_ggml.h"
#include "held_disk.h"
#include "resident_pages.h"
#include "tiny_model.h"

using edgemoe::ExpertBuffer;
using edgemoe::ExpertStore;
using edgemoe::Io;
using edgemoe::page_size;
using fake_ggml::LoadedModel;
using fake_ggml::make_tensor;

namespace {

constexpr uint64_t kPlenty = uint64_t{1} << 30;

TinyModel small_model() {
    return {{{8, {2 * page_size() + 5, 100, 3000}}, {0, {}}, {4, {700, page_size()}}}, {10, 5000, 200000, 64}, 2, 1};
}

struct Described {
    Described(const TinyModel& model, Io io) : api(fake_ggml::make_api()) {
        skip_without(io, model);
        store = std::make_unique<ExpertStore>(io, 2, kPlenty);
        for (const auto& file : model.files) {
            store->add_file(file->path());
        }
        for (const edgemoe::TensorSpec& spec : model.tensors) {
            store->add_tensor(spec);
        }
        buffer = std::make_unique<ExpertBuffer>(*store, api);
    }

    edgemoe::ggml::Api api;
    std::unique_ptr<ExpertStore> store;
    std::unique_ptr<ExpertBuffer> buffer;
};

void loads_as_the_loader_wants(Io io) {
    const TinyModel model = small_model();
    Described described(model, io);
    ExpertBuffer& buffer = *described.buffer;
    LoadedModel loaded(model, buffer);
    CHECK_EQUAL(loaded.status, edgemoe::ggml::kStatusSuccess);
    CHECK_EQUAL(buffer.failure(), "");
    for (size_t id = 0; id < model.tensors.size(); ++id) {
        const edgemoe::TensorSpec& spec = model.tensors[id];
        const auto* data = static_cast<const std::byte*>(loaded.tensors[id].data);
        // The loader must not find the name in the file, or it would read the tensor a second time.
        for (const edgemoe::TensorSpec& other : model.tensors) {
            CHECK(other.name != loaded.tensors[id].name);
        }
        if (spec.n_expert == 0) {
            CHECK(std::memcmp(data, model.bytes_of(id), spec.n_bytes) == 0);
            CHECK_EQUAL(buffer.expert_tensor(&loaded.tensors[id]), -1);
        } else {
            CHECK_EQUAL(reinterpret_cast<uintptr_t>(data) % page_size(), spec.offset % page_size());
            CHECK_EQUAL(buffer.expert_tensor(&loaded.tensors[id]), static_cast<int>(id));
        }
    }
    buffer.restore_names();
    for (size_t id = 0; id < model.tensors.size(); ++id) {
        CHECK_EQUAL(std::string(loaded.tensors[id].name), model.tensors[id].name);
    }
    described.store->acquire(0, 7, {0, 7});
    for (size_t part = 0; part < 3; ++part) {
        const size_t id = model.id_of(0, part);
        const uint64_t n = model.slab_bytes(0, part);
        const auto* data = static_cast<const std::byte*>(loaded.tensors[id].data);
        CHECK(std::memcmp(data + 7 * n, model.bytes_of(id) + 7 * n, n) == 0);
    }
}

}  // namespace

TEST(loading_direct) { loads_as_the_loader_wants(Io::direct); }
TEST(loading_mmap) { loads_as_the_loader_wants(Io::mmap); }
TEST(loading_pread) { loads_as_the_loader_wants(Io::pread); }

TEST(experts_cost_no_memory_at_load) {
    const TinyModel model({{64, {100 * page_size()}}}, {}, 1, 2);
    Described described(model, Io::pread);
    LoadedModel loaded(model, *described.buffer);
    const auto* base = static_cast<const std::byte*>(loaded.memory->iface.get_base(loaded.memory));
    loaded.memory->iface.clear(loaded.memory, 0);
    CHECK(loaded.memory->size >= 6400 * page_size());
    CHECK_EQUAL(count_resident(base, loaded.memory->size), 0U);
}

TEST(tensors_of_no_file_are_ordinary_memory) {
    const TinyModel model = small_model();
    Described described(model, Io::mmap);
    LoadedModel loaded({make_tensor(fake_ggml::kF32, "blk.0.part0.lora_a", {16, 4, 2}),
                        make_tensor(fake_ggml::kF32, "blk.0.part0.lora_b", {4, 16, 2})},
                       *described.buffer);
    CHECK_EQUAL(loaded.status, edgemoe::ggml::kStatusSuccess);
    CHECK_EQUAL(std::string(loaded.tensors[0].name), "blk.0.part0.lora_a");
    CHECK_EQUAL(described.buffer->expert_tensor(&loaded.tensors[0]), -1);
    CHECK_EQUAL(described.buffer->type()->iface.get_alloc_size(described.buffer->type(), &loaded.tensors[0]), 512U);
    const edgemoe::ggml::BufferInterface& iface = loaded.memory->iface;
    const Bytes written = random_bytes(512, 3);
    Bytes found(512);
    iface.clear(loaded.memory, 0);
    iface.get_tensor(loaded.memory, &loaded.tensors[1], found.data(), 0, 512);
    CHECK(found == Bytes(512));
    iface.set_tensor(loaded.memory, &loaded.tensors[0], written.data(), 0, 512);
    iface.set_tensor(loaded.memory, &loaded.tensors[1], written.data() + 100, 100, 412);
    iface.memset_tensor(loaded.memory, &loaded.tensors[1], 0x33, 10, 20);
    iface.get_tensor(loaded.memory, &loaded.tensors[0], found.data(), 0, 512);
    CHECK(found == written);
    iface.get_tensor(loaded.memory, &loaded.tensors[1], found.data(), 0, 512);
    for (size_t i = 0; i < 512; ++i) {
        const std::byte set = i >= 10 && i < 30 ? std::byte{0x33} : std::byte{0};
        CHECK(found[i] == (i >= 100 ? written[i] : set));
    }
}

TEST(views_are_left_alone) {
    const TinyModel model = small_model();
    Described described(model, Io::pread);
    LoadedModel loaded(model, *described.buffer);
    described.buffer->restore_names();
    edgemoe::ggml::Tensor view = loaded.tensors[0];
    view.view_src = &loaded.tensors[0];
    CHECK_EQUAL(loaded.memory->iface.init_tensor(loaded.memory, &view), edgemoe::ggml::kStatusSuccess);
    CHECK(view.data == loaded.tensors[0].data);
    CHECK_EQUAL(std::string(view.name), model.tensors[0].name);
}

TEST(tensor_of_another_size_is_refused) {
    const TinyModel model = small_model();
    const std::string name = model.tensors[model.id_of(2, 0)].name;
    const std::vector<std::vector<int64_t>> wrong_shapes{
        {700, 1, 5},   // more bytes
        {700, 4, 1},   // not stacked by expert
        {1400, 1, 2},  // fewer, larger experts
    };
    for (const std::vector<int64_t>& shape : wrong_shapes) {
        Described described(model, Io::pread);
        LoadedModel loaded({make_tensor(fake_ggml::kI8, name, shape)}, *described.buffer);
        CHECK_EQUAL(loaded.status, edgemoe::ggml::kStatusFailed);
        CHECK_EQUAL(described.buffer->failure(), name + " has another size for llama.cpp than in the file's header");
        CHECK_EQUAL(described.buffer->expert_tensor(&loaded.tensors[0]), -1);
    }
    Described described(model, Io::pread);
    LoadedModel loaded({make_tensor(fake_ggml::kI8, "dense.1", {5001})}, *described.buffer);
    CHECK_EQUAL(loaded.status, edgemoe::ggml::kStatusFailed);
}

TEST(dense_tensor_that_cannot_be_read_is_refused) {
    const TinyModel model = small_model();
    for (const Io io : {Io::pread, Io::mmap, Io::direct}) {
        Described described(model, io);
        for (const auto& file : model.files) {
            file->truncate(10);
        }
        LoadedModel loaded(model, *described.buffer);
        CHECK_EQUAL(loaded.status, edgemoe::ggml::kStatusFailed);
        CHECK(described.buffer->failure().find("was changed while in use") != std::string::npos);
        for (const auto& file : model.files) {
            file->restore();
        }
    }
}

TEST(memory_that_cannot_be_had_is_refused) {
    const TinyModel model = small_model();
    Described described(model, Io::pread);
    edgemoe::ggml::BufferType* type = described.buffer->type();
    CHECK(type->iface.alloc_buffer(type, size_t{1} << 62) == nullptr);
    CHECK(described.buffer->failure().find("address space") != std::string::npos);
}

TEST(ranges_that_cannot_be_watched_leave_nothing_behind) {
    const TinyModel model = small_model();
    Described described(model, Io::mmap);
    edgemoe::ggml::BufferType* type = described.buffer->type();
    std::vector<edgemoe::ggml::Buffer*> buffers;
    while (edgemoe::ggml::Buffer* buffer = type->iface.alloc_buffer(type, 100 * page_size())) {
        buffers.push_back(buffer);
        CHECK(buffers.size() < 1000);
    }
    CHECK(described.buffer->failure().find("too many models") != std::string::npos);
    const auto area_total = [] {
        uint64_t total = 0;
        std::ifstream statm("/proc/self/statm");
        statm >> total;
        return total;
    };
    const uint64_t before = area_total();
    for (int i = 0; i < 50; ++i) {
        CHECK(type->iface.alloc_buffer(type, 1000 * page_size()) == nullptr);
    }
    CHECK(area_total() < before + 25 * 1000);
    for (edgemoe::ggml::Buffer* buffer : buffers) {
        buffer->iface.free_buffer(buffer);
        delete buffer;
    }
}

TEST(memory_is_there_until_nothing_is_read_into_it) {
    const WithHeldDisk with;
    const TinyModel model = small_model();
    Described described(model, Io::pread);
    auto loaded = std::make_unique<LoadedModel>(model, *described.buffer);
    with.disk.forget();
    with.disk.hold({model.tensors[model.id_of(0, 0)].offset});
    described.store->request(0, 1, {0});
    with.disk.await(1);
    std::atomic<bool> let_go{false};
    std::thread other([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        let_go = true;
        with.disk.let_go();
    });
    loaded.reset();
    const bool waited = let_go;
    other.join();
    CHECK(waited);
}

TEST(what_is_stopped_after_the_load_is_no_load) {
    const TinyModel model = small_model();
    Described described(model, Io::pread);
    LoadedModel loaded(model, *described.buffer);
    described.buffer->restore_names();
    described.buffer->interrupt();  // an answer
    LoadedModel adapter({make_tensor(fake_ggml::kF32, "blk.0.part0.lora_a", {16, 4, 2})}, *described.buffer);
    CHECK_EQUAL(adapter.status, edgemoe::ggml::kStatusSuccess);
}
