// The ggml buffer type through which llama.cpp's own loader puts a model into the expert store.
//
// `alloc_buffer` only reserves address space. `init_tensor` is called for each tensor before any data is loaded: an
// expert tensor, or a table that is read by rows, is moved to the address congruent with its file offset and left
// empty; any other tensor is read at once, past the page cache. Both are given another name until `restore_names`,
// because the loader skips what it cannot find in the file. Tensors that are not in the file at all (LoRA adapters) are
// ordinary memory.
#pragma once

#include <atomic>
#include <string>
#include <unordered_map>
#include <vector>

#include "expert_store.h"
#include "ggml_abi.h"

namespace edgemoe {

class ExpertBuffer {
   public:
    ExpertBuffer(ExpertStore& store, const ggml::Api& api);
    ExpertBuffer(const ExpertBuffer&) = delete;
    ExpertBuffer& operator=(const ExpertBuffer&) = delete;

    ggml::BufferType* type() { return &type_; }
    void restore_names();
    void interrupt() { stop_ = true; }  // from any thread: the load fails at the next tensor
    // The store's tensor behind a placed expert tensor, or -1.
    int expert_tensor(const ggml::Tensor* tensor) const {
        const auto found = experts_.find(tensor);
        return found == experts_.end() ? -1 : found->second;
    }
    // The store's tensor behind a placed table that is read by rows, or -1.
    int table(const ggml::Tensor* tensor) const {
        const auto found = tables_.find(tensor);
        return found == tables_.end() ? -1 : found->second;
    }
    // A tensor of the model that is not an expert tensor, by its name in the file; null where there is none.
    const ggml::Tensor* dense(const std::string& name) const {
        const auto found = dense_.find(name);
        return found == dense_.end() ? nullptr : found->second;
    }
    // Why init_tensor or alloc_buffer refused; empty when they did not.
    const std::string& failure() const { return failure_; }

   private:
    struct Region {
        Region(ExpertBuffer* owner, uint64_t size) : owner(owner), size(size), base(reserve_memory(size)) {}
        ~Region() {
            owner->store_.stop_reading();  // a guess may still be on its way here
            release_memory(base, size);
        }
        Region(const Region&) = delete;
        Region& operator=(const Region&) = delete;

        ExpertBuffer* const owner;
        const uint64_t size;
        std::byte* const base;
    };

    static ggml::Buffer* alloc_buffer(ggml::BufferType* type, size_t size);
    static size_t get_alloc_size(ggml::BufferType* type, const ggml::Tensor* tensor);
    static int init_tensor(ggml::Buffer* buffer, ggml::Tensor* tensor);
    void adopt(ggml::Tensor* tensor);

    ExpertStore& store_;
    const ggml::Api& api_;
    ggml::BufferType type_;
    std::unordered_map<std::string, int> by_name_;
    std::unordered_map<const ggml::Tensor*, int> experts_, tables_;
    std::unordered_map<std::string, const ggml::Tensor*> dense_;
    std::vector<std::pair<ggml::Tensor*, int>> renamed_;
    std::atomic<bool> stop_{false};
    bool loaded_ = false;  // what is stopped from now on is a computation
    std::string failure_;
};

}  // namespace edgemoe
