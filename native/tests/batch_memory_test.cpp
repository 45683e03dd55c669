#include "batch_memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "check.h"
#include "fake_ggml.h"
#include "reserved.h"
#include "resident_pages.h"

using edgemoe::BatchMemory;
using edgemoe::page_size;
using edgemoe::ggml::Buffer;
using edgemoe::ggml::Tensor;

namespace {

bool on_host = true;

// A scheduler's buffer that begins and ends within a page, and a node of a graph in it.
class Scheduled {
   public:
    explicit Scheduled(int usage = edgemoe::ggml::kUsageCompute) : memory(8) {
        on_host = true;
        type_.iface.is_host = [](edgemoe::ggml::BufferType*) { return on_host; };
        buffer_.buft = &type_;
        buffer_.iface.get_base = [](Buffer* buffer) { return buffer->context; };
        buffer_.context = memory.base + 64;
        buffer_.size = memory.size - 128;
        buffer_.usage = usage;
        node.buffer = &buffer_;
        std::memset(memory.base, 1, memory.size);
    }

    const Reserved memory;
    Tensor node{};
    BatchMemory batch;

   private:
    edgemoe::ggml::BufferType type_{};
    Buffer buffer_{};
};

}  // namespace

TEST(whole_pages_go_back_and_no_others) {
    Scheduled its;
    its.batch.learn(&its.node);
    CHECK(its.batch.give_back(7 * page_size()));
    CHECK_EQUAL(count_resident(its.memory.base, its.memory.size), 2U);
    CHECK(its.memory.base[63] == std::byte{1} && its.memory.page(7)[0] == std::byte{1});
    CHECK(all_zero(its.memory.page(1), 6 * page_size()));
}

TEST(nothing_is_given_back_before_anything_is_learnt) {
    const Scheduled its;
    CHECK(!its.batch.give_back(1));
    CHECK_EQUAL(count_resident(its.memory.base, its.memory.size), 8U);
}

TEST(memory_that_the_system_keeps_is_not_given_back) {
    Scheduled its;
    its.batch.learn(&its.node);
    // Sanitizers make the C library's function do nothing.
    if (::syscall(SYS_mlock, its.memory.page(2), page_size()) != 0) {
        throw check::Skipped("no memory can be locked");
    }
    CHECK(!its.batch.give_back(1));
    CHECK_EQUAL(::syscall(SYS_munlock, its.memory.page(2), page_size()), 0);
    CHECK(its.batch.give_back(1));
}

TEST(less_than_what_is_asked_for_stays) {
    Scheduled its;
    its.batch.learn(&its.node);
    CHECK(!its.batch.give_back(8 * page_size()));
    CHECK_EQUAL(count_resident(its.memory.base, its.memory.size), 8U);
}

TEST(other_memory_stays) {
    Scheduled weights(edgemoe::ggml::kUsageCompute - 1);
    weights.batch.learn(&weights.node);
    CHECK(!weights.batch.give_back(1));
    Scheduled elsewhere;
    on_host = false;
    elsewhere.batch.learn(&elsewhere.node);
    CHECK(!elsewhere.batch.give_back(1));
    Scheduled unknown;
    unknown.node.buffer = nullptr;
    unknown.batch.learn(&unknown.node);
    CHECK(!unknown.batch.give_back(1));
    CHECK_EQUAL(count_resident(weights.memory.base, weights.memory.size), 8U);
}
